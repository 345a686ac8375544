// The Python module fastpt._C: importing it runs the static initialisers that register every CPU kernel. Host-only
// functions are bound here; tensors go through torch's dispatcher.
#include <pybind11/pybind11.h>

#include "cpu/gemm.h"
#include "cpu/gemm_ceiling.h"
#include "cpu/isa.h"
#include "cpu/region.h"

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = FASTPT_TORCH_MINOR;
        info["isa"] = fastpt::isa_name(fastpt::isa());
        info["gemm_bf16"] = fastpt::gemm_backend(true);
        info["gemm_fp32"] = fastpt::gemm_backend(false);
        info["cuda"] = FASTPT_CUDA != 0;
        return info;
      },
      "torch minor version of the build, and what the CPU kernels run on in this process");
  m.def("gemm_ceiling", &fastpt::gemm_ceiling, pybind11::arg("is_bf16"), pybind11::arg("seconds"),
        "GFLOP/s of one GEMM tile over and over on all threads: what benchmarks hold the kernels against");
  m.def("release_region", &fastpt::release_region,
        "give the free memory between large tensors on the CPU back to the system; its bytes");
}
