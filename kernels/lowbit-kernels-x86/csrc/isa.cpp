#include "isa.h"

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
namespace {

struct Set {
  const Kernels* kernels;
  bool here;
};

const Kernels& choose() {
  // These ask the operating system too, whether it keeps the registers.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Set sets[] = {{&avx512_vnni::kernels, has_avx512 && __builtin_cpu_supports("avx512vnni")},
                      {&avx512::kernels, has_avx512}, {&avx2::kernels, has_avx2}, {&scalar::kernels, true}};
  const char* named = std::getenv("LOWBIT_X86_ISA");
  std::string known;
  for (const Set& set : sets) {
    if (named == nullptr || *named == 0) {
      if (set.here) return *set.kernels;
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
