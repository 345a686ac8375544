// adamw on one block of one tensor: every value is read and written once. The formula is common/adamw.h, inlined here
// and so compiled for the instruction set in force.

// With HasMaster the float32 master is what is updated and `param` its rounded copy.
template <typename P, typename G, bool HasMaster>
void adamw_block(int64_t n, const AdamW& c, P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* master) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float m = exp_avg[i], v = exp_avg_sq[i];
    const float value = adamw_value(c, HasMaster ? master[i] : to_float(param[i]), to_float(grad[i]), m, v);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if constexpr (HasMaster) master[i] = value;
    param[i] = from_float<P>(value);
  }
}
