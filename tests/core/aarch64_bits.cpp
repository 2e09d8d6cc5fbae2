// Prints a hash of the CPU kernel's results, counted zeros included, for pseudo-random tensors of
// every storage under 128 sets of options, and of coupled rows under 32. Built for two
// architectures, it must print the same twice: see `make test-aarch64`. Fails if threads treat
// subnormals differently from their caller.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/prox_sgd.h"
#include "../../csrc/rows.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

using namespace prox_sgd;

namespace {

int width(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2; }

bool is_nan16(DType dtype, uint64_t bits) {
  return (bits & 0x7fff) > (dtype == DType::float16 ? 0x7c00u : 0x7f80u);
}

std::vector<unsigned char> draw(DType dtype, int64_t numel, std::mt19937_64& random) {
  std::vector<unsigned char> bytes(static_cast<size_t>(numel) * width(dtype));
  for (int64_t i = 0; i < numel; ++i) {
    const double value = static_cast<double>(static_cast<int64_t>(random() % 2000001) - 1000000) /
                         (random() % 4 ? 1e7 : 1e5);
    unsigned char* to = bytes.data() + i * width(dtype);
    if (dtype == DType::float64) {
      std::memcpy(to, &value, 8);
    } else if (dtype == DType::float32) {
      const float narrow = static_cast<float>(value);
      std::memcpy(to, &narrow, 4);
    } else {
      uint16_t bits = static_cast<uint16_t>(random());
      if (is_nan16(dtype, bits)) bits = 0;
      std::memcpy(to, &bits, 2);
    }
  }
  return bytes;
}

// The dtypes of a storage's tensors.
struct Stored {
  Storage storage;
  DType param;
  DType momentum_buffer;
  bool master;
};
constexpr Stored kStorages[] = {
    {Storage::float32, DType::float32, DType::float32, false},
    {Storage::float64, DType::float64, DType::float64, false},
    {Storage::float16, DType::float16, DType::float16, false},
    {Storage::bfloat16, DType::bfloat16, DType::bfloat16, false},
    {Storage::float32_momentum_bfloat16, DType::float32, DType::bfloat16, false},
    {Storage::bfloat16_master, DType::bfloat16, DType::float32, true},
    {Storage::bfloat16_master_momentum_bfloat16, DType::bfloat16, DType::bfloat16, true},
    {Storage::float16_master, DType::float16, DType::float32, true},
};

Options plain_options(double lr) {
  Options options{};
  options.lr = lr;
  options.grad_scale = 1.0f;
  options.grad_coefficient = 1.0f;
  return options;
}

// As torch.set_flush_denormal does, for this thread.
void flush_subnormals(bool flush) {
#if defined(__SSE2__)
  _mm_setcsr(flush ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
#else
  uint64_t control = 0;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  const uint64_t flush_to_zero = uint64_t{1} << 24;
  control = flush ? control | flush_to_zero : control & ~flush_to_zero;
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

std::vector<float> step_on_subnormals(int threads) {
  std::vector<float> p(400000, 3e-39f);
  const std::vector<float> g(p.size(), 2e-39f);
  const auto numel = static_cast<int64_t>(p.size());
  cpu::prox_sgd({{p.data(), g.data(), nullptr, nullptr, nullptr, numel, nullptr}}, Storage::float32,
                plain_options(0.5), threads);
  return p;
}

bool threads_flush_as_their_caller() {
  bool alike = true;
  for (const bool flush : {false, true}) {
    flush_subnormals(flush);
    const std::vector<float> alone = step_on_subnormals(1);
    const std::vector<float> together = step_on_subnormals(4);
    flush_subnormals(false);
    alike = alike && alone == together && (alone[0] == 0.0f) == flush;
  }
  return alike;
}

}  // namespace

int main() {
  if (!threads_flush_as_their_caller()) {
    std::puts("threads treat subnormals differently from their caller");
    return 1;
  }
  std::mt19937_64 random(5);
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  const auto take = [&](uint64_t bits) { hash = (hash ^ bits) * 1099511628211u; };
  const auto take_all = [&](DType dtype, const std::vector<unsigned char>& bytes) {
    for (size_t at = 0; at < bytes.size(); at += width(dtype)) {
      uint64_t bits = 0;
      std::memcpy(&bits, bytes.data() + at, width(dtype));
      take(width(dtype) == 2 && is_nan16(dtype, bits) ? 0x7fff : bits);
    }
  };
  for (const Stored& stored : kStorages) {
    for (int set = 0; set < 128; ++set) {
      const int64_t numel = 1000 + set;
      auto p = draw(stored.param, numel, random);
      const auto g = draw(stored.param, numel, random);
      auto m = draw(stored.momentum_buffer, numel, random);
      auto w = draw(DType::float32, stored.master ? numel : 0, random);
      const bool momentum = set & 1;
      const bool dampening = set & 2;
      Options options = plain_options(0.1);
      options.momentum = momentum ? 0.9 : 0.0;
      options.dampening = dampening ? 0.3 : 0.0;
      options.weight_decay = set & 4 ? 0.01 : 0.0;
      options.l1 = set & 8 ? 0.05 : 0.0;
      options.nesterov = momentum && !dampening && (set & 64) != 0;
      options.maximize = (set & 16) != 0;
      options.proximal = (set & 32) != 0;
      int64_t num_zeros = 0;
      int64_t* const counter = set % 3 ? &num_zeros : nullptr;
      cpu::prox_sgd({{p.data(), g.data(), m.data(), stored.master ? w.data() : nullptr, nullptr,
                      numel, counter}},
                    stored.storage, options, 1);
      take_all(stored.param, p);
      take_all(stored.momentum_buffer, m);
      take_all(DType::float32, w);
      take(static_cast<uint64_t>(num_zeros));
    }
    for (int set = 0; set < 32; ++set) {  // coupled rows: two parameters, one of them a norm's
      constexpr int64_t kRows = 37;
      RowSet coupled{{}, stored.storage, kRows, 10.0, 0.0, nullptr};
      std::vector<double> weights(kRows);
      for (double& weight : weights) weight = static_cast<double>(random() % 100) / 50;
      coupled.weights = weights.data();
      std::vector<std::vector<unsigned char>> arrays;
      arrays.reserve(8);
      int64_t num_zeros = 0;
      for (const int64_t row : {int64_t{1} + 41 * set, int64_t{1}}) {
        const int64_t numel = kRows * row;
        const auto drawn = [&](DType dtype, int64_t size) {
          arrays.push_back(draw(dtype, size, random));
          return arrays.back().data();
        };
        void* const p = drawn(stored.param, numel);
        const void* const g = drawn(stored.param, numel);
        void* const m = drawn(stored.momentum_buffer, numel);
        void* const w = stored.master ? drawn(DType::float32, numel) : nullptr;
        coupled.members.push_back({{p, g, m, w, nullptr, numel, &num_zeros}, row, 0});
      }
      Options options = plain_options(0.1);
      options.momentum = set & 1 ? 0.9 : 0.0;
      options.l1 = set & 2 ? 0.05 : 0.0;
      options.weight_decay = 0.01;
      options.proximal = (set & 4) != 0;
      options.nesterov = (set & 9) == 9;
      cpu::prox_sgd_rows({coupled}, {options}, 2);
      size_t at = 0;
      for (int member = 0; member < 2; ++member) {
        take_all(stored.param, arrays[at]);
        take_all(stored.momentum_buffer, arrays[at + 2]);
        if (stored.master) take_all(DType::float32, arrays[at + 3]);
        at += stored.master ? 4 : 3;
      }
      take(static_cast<uint64_t>(num_zeros));
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}
