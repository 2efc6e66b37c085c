// Declares an op's tables of kernels once for each instruction set; PIX2REP_PICK (isa.h) chooses one.
#pragma once

#define PIX2REP_TABLES(...)            \
  namespace baseline { __VA_ARGS__ }   \
  namespace avx2 { __VA_ARGS__ }       \
  namespace avx512 { __VA_ARGS__ }
