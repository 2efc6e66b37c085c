// Refuse bad arguments with the wording of pix2rep_kernels/check.py: argument, expectation, value.
#pragma once

#include <torch/headeronly/util/Exception.h>

#define PIX2REP_EXPECT(condition, argument, expectation, ...) \
  STD_TORCH_CHECK(condition, "`", argument, "` must ", expectation, ", got ", __VA_ARGS__)
