#include "lanes_avx512.h"

#include "attention.h"
#include "product.h"

namespace pyps::kernels {

extern const Kernels avx512vnni = { "avx512vnni", Lanes::n, kProducts, sizeof(kProducts) / sizeof(kProducts[0]),
                                    quantise,     attend,   merge };

}  // namespace pyps::kernels
