// Prints a hash of what the CPU kernel makes of pseudo-random tensors in every dtype under 64
// option sets. Built for two architectures, it must print the same twice: see `make test-aarch64`.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/prox_sgd.h"

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

}  // namespace

int main() {
  std::mt19937_64 random(5);
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  for (const DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    for (int set = 0; set < 64; ++set) {
      const int64_t numel = 1000 + set;
      auto p = draw(dtype, numel, random);
      const auto g = draw(dtype, numel, random);
      auto m = draw(dtype, numel, random);
      const bool momentum = set & 1;
      const bool dampening = set & 2;
      const Options options{0.1,
                            momentum ? 0.9 : 0.0,
                            dampening ? 0.3 : 0.0,
                            set & 4 ? 0.01 : 0.0,
                            set & 8 ? 0.05 : 0.0,
                            momentum && !dampening,
                            (set & 16) != 0,
                            (set & 32) != 0,
                            false};
      cpu::prox_sgd({{p.data(), g.data(), m.data(), numel}}, dtype, options, cpu::Simd::baseline,
                    1);
      for (const auto* bytes : {&p, &m}) {
        for (int64_t i = 0; i < numel; ++i) {
          uint64_t bits = 0;
          std::memcpy(&bits, bytes->data() + i * width(dtype), width(dtype));
          if (width(dtype) == 2 && is_nan16(dtype, bits)) bits = 0x7fff;
          hash = (hash ^ bits) * 1099511628211u;
        }
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}
