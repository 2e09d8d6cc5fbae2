// One step on two threads whose chunks all count zeros of one tensor.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/elements.h"
#include "prox_sgd.h"

namespace prox_sgd::cpu {
Kernel kernel_for(Storage, MomentumMode, UpdateForm, bool, bool) {
  return [](const Operands&, const void*, int64_t, int64_t) -> int64_t {
    // Both threads meet in their first chunks. Relaxed: nothing is ordered by it.
    static std::atomic<int> arrived{0};
    thread_local bool here = false;
    if (!here) arrived.fetch_add(1, std::memory_order_relaxed);
    here = true;
    while (arrived.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    return 1;
  };
}
}  // namespace prox_sgd::cpu

int main() {
  using namespace prox_sgd;
  static int64_t zeros = 0;
  Operands operands{};
  operands.numel = int64_t(1) << 24;
  operands.num_zeros = &zeros;
  Options options{};
  options.lr = 0.1;
  cpu::prox_sgd({operands}, Storage::float32, options, 2);
  std::puts("stepped");
  std::fflush(stdout);
  _exit(0);  // the end of a parallel region is nothing that ThreadSanitizer sees
}
