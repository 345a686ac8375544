// glibc's malloc maps blocks beyond a threshold afresh each time and gives the top of the heap back to the system when
// it exceeds twice that; both rise to the largest mapped block freed so far, here once to what they may be at most.
// Until then the gradients that an optimizer lets go are page faults of the next step. Thresholds that the user sets
// stay as they are.
#include <cstdlib>

namespace {

const bool kIsTaught = [] {
  void* volatile block = std::malloc(size_t{31} << 20);  // volatile: the pair is not to be optimised away
  std::free(block);
  return true;
}();

}  // namespace
