// Where tensors of 16 KiB and more live on the CPU, once fastpt._C is imported: one region of addresses of their own.
// In malloc's heap small objects settle between the activations of a step, so that the room which a freed one leaves
// does not hold the next of its size; and malloc maps large blocks anew each time, a page fault every 4 KiB. What was
// written stays resident until release_region(), as in torch's allocator for GPUs.
#pragma once

#include <cstddef>

namespace fastpt {

constexpr size_t kInRegionFrom = size_t{16} << 10;  // below: malloc, as torch does it

// Gives the whole pages of all free rooms back to the system; their number of bytes.
size_t release_region();

}  // namespace fastpt
