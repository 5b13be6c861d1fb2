/* Loaded before libc by a Redis of the tests (LD_PRELOAD): while the file that CLOCK_SET_BACK names exists, its clock
 * is a day behind. Debian's faketime can't do it: Redis' allocator asks for the time before that library is ready. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

int gettimeofday(struct timeval *time, void *zone)
{
    int result = syscall(SYS_gettimeofday, time, zone);
    const char *path = getenv("CLOCK_SET_BACK");
    if (result == 0 && path && access(path, F_OK) == 0)
        time->tv_sec -= 86400;
    return result;
}
