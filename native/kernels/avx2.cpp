#include "lanes_avx2.h"

#include "attention.h"
#include "product.h"

namespace pyps::kernels {

extern const Kernels avx2 = { "avx2",   Lanes::n, kProducts, sizeof(kProducts) / sizeof(kProducts[0]),
                              quantise, attend,   merge };

}  // namespace pyps::kernels
