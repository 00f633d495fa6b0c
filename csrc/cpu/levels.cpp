// The instruction sets the inner loops are compiled for, and the choice among them.
#include "level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define GROUNDKERN_X86_LEVELS 1
#include <immintrin.h>
#endif

namespace groundkern {
namespace {

#define LEVEL baseline
#define NAME "baseline"
#define TARGET
#define VECTOR 16
#define ROWS 4
#define BFLOAT16 0
#include "level.inc"

#if GROUNDKERN_X86_LEVELS
#define X86_V3 "avx,avx2,bmi,bmi2,f16c,fma,lzcnt,movbe,popcnt"
#define X86_V4 X86_V3 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"

#define LEVEL avx2
#define NAME "avx2"
#define TARGET __attribute__((target(X86_V3)))
#define VECTOR 32
#define ROWS 4
#define BFLOAT16 0
#include "level.inc"

#define LEVEL avx512
#define NAME "avx512"
#define TARGET __attribute__((target(X86_V4)))
#define VECTOR 64
#define ROWS 8
#define BFLOAT16 0
#include "level.inc"

#define LEVEL avx512_bf16
#define NAME "avx512_bf16"
#define TARGET __attribute__((target(X86_V4 ",avx512bf16")))
#define VECTOR 64
#define ROWS 8
#define BFLOAT16 1
#include "level.inc"
#endif

// Those this CPU runs, best first.
std::vector<const Level*> available() {
  std::vector<const Level*> levels;
#if GROUNDKERN_X86_LEVELS
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) levels.push_back(&avx512_bf16::TABLE);
  if (v4) levels.push_back(&avx512::TABLE);
  if (v3) levels.push_back(&avx2::TABLE);
#endif
  levels.push_back(&baseline::TABLE);
  return levels;
}

}  // namespace

std::vector<const char*> level_names() {
  std::vector<const char*> names;
  for (const Level* one : available()) names.push_back(one->name);
  return names;
}

const Level& level() {
  const std::vector<const Level*> levels = available();
  const char* const wanted = std::getenv("GROUNDKERN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *levels.front();
  std::string names;
  for (const Level* one : levels) {
    if (std::string(one->name) == wanted) return *one;
    names += (names.empty() ? "" : ", ") + std::string(one->name);
  }
  throw std::invalid_argument("`GROUNDKERN_CPU_ISA`: expected one of " + names + ", got " + wanted);
}

bool has_matrix_product(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? level().dots_bfloat16 : level().wide;
}

}  // namespace groundkern
