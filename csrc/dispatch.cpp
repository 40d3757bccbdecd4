#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eamnet {
namespace {

constexpr Level kLevels[] = {Level::baseline, Level::avx2, Level::avx512, Level::amx_bf16};

#if defined(__x86_64__)
// Linux lets a process use the tile registers, 8 KiB that each thread then saves, only if it asks; it
// refuses where the processor, the kernel or the virtual machine lacks them. Threads started earlier
// or later are included.
bool tiles_permitted() {
  unsigned int a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned int kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool supported(Level level) {
#if defined(__x86_64__)
  // These look at what the operating system saves, too, not only at the processor.
  switch (level) {
    case Level::baseline:
      return true;
    case Level::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Level::avx512:
      return supported(Level::avx2) && __builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl");
    case Level::amx_bf16:
      return supported(Level::avx512) && __builtin_cpu_supports("avx512bf16") && tiles_permitted();
  }
  return false;
#else
  return level == Level::baseline;
#endif
}

Level choose() {
  std::string accepted;
  Level best = Level::baseline;
  for (const Level level : kLevels) {
    if (!supported(level)) continue;
    best = level;
    accepted += (accepted.empty() ? "" : ", ") + std::string(level_name(level));
  }
  const char* wanted = std::getenv("EAMNET_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Level level : kLevels) {
    if (wanted == std::string(level_name(level)) && supported(level)) return level;
  }
  throw std::runtime_error(
      "EAMNET_CPU_LEVEL is '" + std::string(wanted) + "'; this processor accepts: " + accepted);
}

}  // namespace

const char* level_name(Level level) {
  switch (level) {
    case Level::baseline:
      return "baseline";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::amx_bf16:
      return "amx_bf16";
  }
  return "unknown";
}

Level active_level() {
  // A throwing initialiser leaves it unset, so that every later call reports the same error.
  static const Level level = choose();
  return level;
}

}  // namespace eamnet
