// The instruction sets that kernels are compiled for, and which of them runs here.
#pragma once

#include "kernels.h"

namespace lowbit {

// The kernels of the best instruction set that processor and system have, or of the one that LOWBIT_X86_ISA names; chosen
// once. Throws std::runtime_error where that is none, or one that this machine lacks.
const Kernels& kernels();

}  // namespace lowbit
