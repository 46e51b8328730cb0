// Memory that is kept from use to use: fresh pages cost small networks a tenth of their time.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace cibp {

// A block of bytes, uninitialised, from a line of the cache on. At most kKept blocks stay when they
// are no longer used, so what stays is bounded by what was in use.
class Memory {
 public:
  explicit Memory(size_t bytes) {
    if (bytes == 0) bytes = 1;
    const std::lock_guard<std::mutex> lock(mutex());
    auto best = kept().end();  // the smallest that is large enough, and not much too large
    for (auto it = kept().begin(); it != kept().end(); ++it)
      if (it->bytes >= bytes && it->bytes / 2 <= bytes &&
          (best == kept().end() || it->bytes < best->bytes))
        best = it;
    if (best != kept().end()) {
      block_ = *best;
      kept().erase(best);
    } else {
      block_ = {std::aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
      if (!block_.data) throw std::bad_alloc();
    }
    size_ = bytes;
#ifdef CIBP_POISON  // tests: whatever is read before it is written turns the result into NaN
    std::memset(block_.data, 0xff, bytes);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    const std::lock_guard<std::mutex> lock(mutex());
    kept().push_back(block_);
    if (kept().size() > kKept) {  // the one unused for longest
      std::free(kept().front().data);
      kept().erase(kept().begin());
    }
  }
  void* data() const { return block_.data; }
  size_t size() const { return size_; }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
#ifdef CIBP_POISON  // tests: a new block each time, so that ASan sees what lies outside it
  static constexpr size_t kKept = 0;
#else
  static constexpr size_t kKept = 8;
#endif
  // Never destroyed: tensors may outlive this module.
  static std::vector<Block>& kept() {
    static auto* blocks = [] {
      auto* made = new std::vector<Block>;
      made->reserve(kKept + 1);  // so that a destructor need not
      return made;
    }();
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* instance = new std::mutex;
    return *instance;
  }

  Block block_;
  size_t size_;
};

}  // namespace cibp
