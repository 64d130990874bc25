#define OPD_ISA baseline
#include "isa.inl"
