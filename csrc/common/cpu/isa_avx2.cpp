#define OPD_ISA avx2
#include "isa.inl"
