// Element types of tensors, and activations, by the numbers under which Python passes them.
#pragma once

#include <cstdint>

namespace ffmerge {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Activation : int { none = 0, relu, gelu, gelu_tanh, silu, relu2, quick_gelu };

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace ffmerge
