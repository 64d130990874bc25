#define OPD_ISA avx512
#include "isa.inl"
