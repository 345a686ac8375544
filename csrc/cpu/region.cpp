// A block goes to the smallest room that holds it (of several the first), else to the end; rooms that touch become one.
#include "cpu/region.h"

#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // which looks after malloc's blocks only
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define FASTPT_HAS_REGION 1
#endif

namespace fastpt {

#ifdef FASTPT_HAS_REGION
namespace {

constexpr size_t kAlignment = 64;  // also what stands before a block: its size

class Region {
 public:
  Region() {
    const size_t pages = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)),
                 page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    page_ = page;
    size_ = 2 * pages * page;  // addresses only: rooms take some, memory is taken when it is written
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    begin_ = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  }

  bool holds(const void* block) const {
    const auto* at = static_cast<const char*>(block);
    return begin_ != nullptr && at >= begin_ && at < begin_ + size_;
  }

  // nullptr where there is no room: the system gave no addresses, or they are all in use.
  void* take(size_t bytes) {
    const size_t size = (bytes + kAlignment + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard lock(mutex_);
    size_t at = end_;
    if (const auto room = by_size_.lower_bound({size, 0}); room != by_size_.end()) {
      const auto [room_size, start] = *room;
      remove(start);
      if (room_size > size) add(start + size, room_size - size);
      at = start;
    } else if (begin_ == nullptr || end_ + size > size_) {
      return nullptr;
    } else {
      end_ += size;
      touched_ = std::max(touched_, end_);
    }
    *reinterpret_cast<size_t*>(begin_ + at) = size;
    return begin_ + at + kAlignment;
  }

  void give(void* block) {
    auto at = static_cast<size_t>(static_cast<char*>(block) - begin_) - kAlignment;
    size_t size = *reinterpret_cast<size_t*>(begin_ + at);
    const std::lock_guard lock(mutex_);
    const auto next = rooms_.lower_bound(at);
    const bool has_next = next != rooms_.end() && at + size == next->first;
    const size_t after = has_next ? next->first : 0;
    if (next != rooms_.begin()) {
      const auto [start, room] = *std::prev(next);
      if (start + room == at) {
        remove(start);
        at = start;
        size += room;
      }
    }
    if (has_next) size += remove(after);
    if (at + size < end_) return add(at, size);
    end_ = at;
  }

  size_t release_rooms() {
    const std::lock_guard lock(mutex_);
    size_t released = release(end_, touched_);
    for (const auto& [start, size] : rooms_) released += release(start, start + size);
    touched_ = end_;
    return released;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  size_t release(size_t from, size_t to) {
    from = (from + page_ - 1) / page_ * page_;
    to = to / page_ * page_;
    return from < to && madvise(begin_ + from, to - from, MADV_DONTNEED) == 0 ? to - from : 0;
  }
  void add(size_t start, size_t size) {
    rooms_.emplace(start, size);
    by_size_.emplace(size, start);
  }
  size_t remove(size_t start) {
    const auto room = rooms_.find(start);
    const size_t size = room->second;
    by_size_.erase({size, start});
    rooms_.erase(room);
    return size;
  }

  char* begin_ = nullptr;
  size_t size_ = 0, page_ = 4096;
  size_t end_ = 0, touched_ = 0;    // of blocks; of pages that were written since they were last given back
  std::map<size_t, size_t> rooms_;  // start -> size
  std::set<std::pair<size_t, size_t>> by_size_;  // (size, start)
  std::mutex mutex_;
};

Region& region() {
  static auto* one = new Region;  // never destroyed: tensors of other static objects may outlive it
  return *one;
}

class RegionAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes >= kInRegionFrom ? region().take(bytes) : nullptr;
    if (block == nullptr)
      block = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    else
      c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &give, at::Device(at::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void give(void* block) {
    if (!region().holds(block)) return c10::GetDefaultCPUAllocator()->raw_deallocate(block);
    c10::profiledCPUMemoryReporter().Delete(block);
    region().give(block);
  }
};

const bool kIsInstalled = [] {
  // A process that forks (data workers) does so while no thread is inside.
  pthread_atfork([] { region().mutex().lock(); }, [] { region().mutex().unlock(); }, [] { region().mutex().unlock(); });
  c10::SetCPUAllocator(new RegionAllocator);
  return true;
}();

}  // namespace

size_t release_region() {
  return region().release_rooms();
}
#else
size_t release_region() {
  return 0;
}
#endif

}  // namespace fastpt
