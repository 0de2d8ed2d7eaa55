#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lowbit {
namespace scalar {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels dots;
}
namespace amx {
extern const Kernels dots;
}
namespace {

// A set's products of pairs, and of tiles, and the rest of the set before.
Kernels with(const Kernels& dots) {
  Kernels all = avx512_vnni::kernels;
  all.isa = dots.isa;
  all.takes_pairs = dots.takes_pairs;
  all.pair = dots.pair;
  all.by_pairs = dots.by_pairs;
  all.few_pairs = dots.few_pairs;
  all.tiled_bytes = dots.tiled_bytes;
  all.tile_bytes = dots.tile_bytes;
  all.integers_by_tiles = dots.integers_by_tiles;
  return all;
}

struct Set {
  const Kernels* kernels;
  bool here, preferred;
};

// Whether there are tiles of bytes and bfloat16s, and the operating system keeps them for this process, which must ask.
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr long ask = 0x1023, tile_data = 18;
  return (d & needed) == needed && syscall(SYS_arch_prctl, ask, tile_data) == 0;
}

const Kernels& choose() {
  // These ask the operating system too, whether it keeps the registers.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  static const Kernels with_bf16 = with(avx512_bf16::dots), with_tiles = with(amx::dots);
  // Pairs of bfloat16s take Intel's processors longer than two products of float32.
  const Set sets[] = {{&with_tiles, has_bf16 && has_tiles(), true},
                      {&with_bf16, has_bf16, !__builtin_cpu_is("intel")},
                      {&avx512_vnni::kernels, has_vnni, true},
                      {&avx512::kernels, has_avx512, true},
                      {&avx2::kernels, has_avx2, true},
                      {&scalar::kernels, true, true}};
  const char* named = std::getenv("LOWBIT_X86_ISA");
  std::string known;
  for (const Set& set : sets) {
    if (named == nullptr || *named == 0) {
      if (set.here && set.preferred) return *set.kernels;
    } else if (std::string(named) == set.kernels->isa) {
      if (set.here) return *set.kernels;
      throw std::runtime_error(std::string("LOWBIT_X86_ISA is ") + named + ", which this processor or system lacks");
    }
    known += std::string(known.empty() ? "" : ", ") + set.kernels->isa;
  }
  throw std::runtime_error(std::string("LOWBIT_X86_ISA is ") + named + "; it must be one of " + known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lowbit
