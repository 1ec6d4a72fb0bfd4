/* What this processor, and the operating system, can do. */

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { AVX512 = 1, AMX_BF16 = 2 };
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

/* Linux lends the tile registers on request, once per process. */
static int may_use_tiles(void) {
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Of the sources from which this library was built. */
unsigned sources_checksum(void) { return CHECKSUM; }

int processor_features(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    int found = 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        found |= AVX512;
    int tiles_and_bf16 = 1 << 24 | 1 << 22; /* EDX of leaf 7 */
    if (found && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
        (d & tiles_and_bf16) == (unsigned)tiles_and_bf16 && may_use_tiles())
        found |= AMX_BF16;
    return found;
}
