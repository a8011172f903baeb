// How a function gets a name that Python finds by ctypes: nothing else leaves the library.
#pragma once

#if defined(_WIN32)
#define TRUENORM_EXPORT extern "C" __declspec(dllexport)
#else
#define TRUENORM_EXPORT extern "C" __attribute__((visibility("default")))
#endif
