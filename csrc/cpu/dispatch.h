// Choice of the instruction set at run time.
//
// A kernel file csrc/cpu/<operator>.cpp is compiled once per level, with -DEAMNET_LEVEL=<level>, and
// for the baseline also with -DEAMNET_HOST: what follows #ifdef EAMNET_HOST (checks of tensors,
// registration) exists once and runs everywhere.
//
//   struct AddArguments { const float* x; ... };           // plain data, in namespace eamnet
//   EAMNET_KERNEL(add, AddArguments)                        // declares it on every level
//   namespace EAMNET_LEVEL {
//   void add(const AddArguments& arguments) { ... }         // this level's
//   }
//   #ifdef EAMNET_HOST
//   ... add(arguments);                                     // runs the active level's
//   #endif
#pragma once

namespace eamnet {

enum class Level : int { baseline, avx2, avx512, amx_bf16 };

// The level in use: the highest that this processor has, or that of the environment variable
// EAMNET_CPU_LEVEL, read at the first call. Throws std::runtime_error where the variable names a
// level that is unknown or that this processor lacks.
Level active_level();
const char* level_name(Level level);

}  // namespace eamnet

#if defined(__x86_64__)
#define EAMNET_KERNEL(name, Arguments)                                                     \
  namespace baseline { void name(const Arguments&); }                                      \
  namespace avx2 { void name(const Arguments&); }                                          \
  namespace avx512 { void name(const Arguments&); }                                        \
  namespace amx_bf16 { void name(const Arguments&); }                                      \
  inline void name(const Arguments& arguments) {                                           \
    switch (active_level()) {                                                              \
      case Level::baseline: return baseline::name(arguments);                              \
      case Level::avx2: return avx2::name(arguments);                                      \
      case Level::avx512: return avx512::name(arguments);                                  \
      case Level::amx_bf16: return amx_bf16::name(arguments);                              \
    }                                                                                      \
  }
#else
#define EAMNET_KERNEL(name, Arguments)                                                     \
  namespace baseline { void name(const Arguments&); }                                      \
  inline void name(const Arguments& arguments) {                                           \
    active_level();                                                                        \
    baseline::name(arguments);                                                             \
  }
#endif
