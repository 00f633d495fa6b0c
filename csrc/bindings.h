// The functions of groundkern._C: each takes its arguments by name and runs a kernel of ops.h.
#pragma once

#include "arguments.h"

namespace groundkern {

void forward_side_attention(Arguments& given);
void backward_side_attention(Arguments& given);
void forward_attention_map(Arguments& given);
void backward_attention_map(Arguments& given);
void forward_linear_cross_entropy(Arguments& given);
void backward_linear_cross_entropy(Arguments& given);

}  // namespace groundkern
