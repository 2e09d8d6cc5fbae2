// A step on two threads, of elements or of coupled rows, with kernels that do nothing but write to
// what is theirs; all chunks and pieces count zeros of one tensor.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/elements.h"
#include "cpu/rows.h"
#include "rows.h"

namespace prox_sgd::cpu {
namespace {

// Both threads meet in their first chunks. Relaxed: nothing is ordered by it.
void meet() {
  static std::atomic<int> arrived{0};
  thread_local bool here = false;
  if (!here) arrived.fetch_add(1, std::memory_order_relaxed);
  here = true;
  while (arrived.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
}

void update(const Operands&, const void*, void* weights, int64_t rows, int64_t width, double*) {
  meet();
  auto* const theirs = static_cast<volatile float*>(weights);
  for (int64_t row = 0; row < rows; ++row) theirs[row * width] = 1.0f;  // by two threads: a race
}

int64_t scale(const Operands&, void*, int64_t, int64_t, const double*, double, bool) { return 1; }

}  // namespace

Kernel kernel_for(Storage, MomentumMode, UpdateForm, bool, bool) {
  return [](const Operands&, const void*, int64_t, int64_t) -> int64_t {
    meet();
    return 1;
  };
}

RowKernels row_kernels_for(Storage storage, MomentumMode, UpdateForm, bool) {
  return {update, scale, 4, 4, 4, 4, storage == Storage::float16};
}
}  // namespace prox_sgd::cpu

int main(int, char** arguments) {
  using namespace prox_sgd;
  static int64_t zeros = 0;
  Operands operands{};
  operands.numel = int64_t(1) << 24;
  operands.num_zeros = &zeros;
  Options options{};
  options.lr = 0.1;
  if (std::strcmp(arguments[1], "elements") == 0) {
    cpu::prox_sgd({operands}, Storage::float32, options, 2);
  } else {
    std::vector<float> memory(static_cast<size_t>(operands.numel));
    operands.param = memory.data();
    const auto storage =
        std::strcmp(arguments[1], "scratch") == 0 ? Storage::float16 : Storage::float32;
    const RowSet set{{{operands, 1 << 12, 0}}, storage, 1 << 12, 1.0, 1.0, nullptr};
    cpu::prox_sgd_rows({set}, {options}, 2);
  }
  std::puts("stepped");
  std::fflush(stdout);
  _exit(0);  // the end of a parallel region is nothing that ThreadSanitizer sees
}
