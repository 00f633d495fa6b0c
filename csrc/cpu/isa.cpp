// The instruction sets that the inner loops are compiled for, and the choice among them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define GROUNDKERN_X86_ISAS 1
#include <immintrin.h>
#endif

namespace groundkern {
namespace {

#define ISA baseline
#define NAME "baseline"
#define TARGET
#define VECTOR 16
#define ROWS 4
#define BFLOAT16 0
#include "isa.inc"

#if GROUNDKERN_X86_ISAS
#define X86_V3 "avx,avx2,bmi,bmi2,f16c,fma,lzcnt,movbe,popcnt"
#define X86_V4 X86_V3 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"

#define ISA avx2
#define NAME "avx2"
#define TARGET __attribute__((target(X86_V3)))
#define VECTOR 32
#define ROWS 4
#define BFLOAT16 0
#include "isa.inc"

#define ISA avx512
#define NAME "avx512"
#define TARGET __attribute__((target(X86_V4)))
#define VECTOR 64
#define ROWS 8
#define BFLOAT16 0
#include "isa.inc"

#define ISA avx512_bf16
#define NAME "avx512_bf16"
#define TARGET __attribute__((target(X86_V4 ",avx512bf16")))
#define VECTOR 64
#define ROWS 8
#define BFLOAT16 1
#include "isa.inc"
#endif

// Those that this CPU has, best first.
std::vector<const Isa*> available() {
  std::vector<const Isa*> isas;
#if GROUNDKERN_X86_ISAS
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) isas.push_back(&avx512_bf16::TABLE);
  if (v4) isas.push_back(&avx512::TABLE);
  if (v3) isas.push_back(&avx2::TABLE);
#endif
  isas.push_back(&baseline::TABLE);
  return isas;
}

}  // namespace

std::vector<const char*> isa_names() {
  std::vector<const char*> names;
  for (const Isa* one : available()) names.push_back(one->name);
  return names;
}

const Isa& chosen_isa() {
  const std::vector<const Isa*> isas = available();
  const char* const wanted = std::getenv("GROUNDKERN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *isas.front();
  std::string names;
  for (const Isa* one : isas) {
    if (std::string(one->name) == wanted) return *one;
    names += (names.empty() ? "" : ", ") + std::string(one->name);
  }
  throw std::invalid_argument("`GROUNDKERN_CPU_ISA`: expected one of " + names + ", got " + wanted);
}

bool has_matrix_product(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? chosen_isa().dots_bfloat16 : chosen_isa().wide;
}

}  // namespace groundkern
