// What a new compiler takes from the newest glibc and libstdc++, made of what the older ones have
// too: the library then loads wherever torch's own wheels do (manylinux_2_28), whatever system it
// was built on. CMakeLists.txt has the linker lead every use of a name that is wrapped (--wrap) to
// here.
#if defined(__linux__)
#include <cmath>
#include <new>
#include <sstream>
#include <string>

// Whether the process has one thread, in glibc since 2.32. A constant no costs an atomic addition
// where a shared pointer is copied.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// Since 2.29 pow sets no error handler off. For the numbers the two are one.
#if defined(__aarch64__)
__asm__(".symver truenorm_old_pow, pow@GLIBC_2.17");
#else
__asm__(".symver truenorm_old_pow, pow@GLIBC_2.2.5");
#endif
extern "C" double truenorm_old_pow(double base, double exponent);
extern "C" double __wrap_pow(double base, double exponent) {
  return truenorm_old_pow(base, exponent);
}

// Streams without a mode, in libstdc++ since GCC 9: the mode spelled out.
extern "C" void __wrap__ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* at) {
  ::new (at) std::stringstream(std::ios_base::in | std::ios_base::out);
}
extern "C" void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* at) {
  ::new (at) std::ostringstream(std::ios_base::out);
}

// What a stream holds: one function, since GCC 11 one for a stream that stays and one for a stream
// that goes.
std::string truenorm_held(const std::stringbuf* stream) __asm__(
    "_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string truenorm_held_by(const std::stringbuf* stream) __asm__(
    "__wrap__ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string truenorm_held_by(const std::stringbuf* stream) { return truenorm_held(stream); }
std::string truenorm_held_at_the_end(const std::stringbuf* stream) __asm__(
    "__wrap__ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string truenorm_held_at_the_end(const std::stringbuf* stream) { return truenorm_held(stream); }
#endif
