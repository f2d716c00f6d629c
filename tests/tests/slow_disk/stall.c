/* A disk that stalls, for kmorphd only: loaded with LD_PRELOAD.
 *
 * While the file KMORPH_STALL exists, these calls do not return: opening, creating, renaming and removing paths below
 * KMORPH_STALL_UNDER, writing to the log (standard error), and, if KMORPH_STALL_SYNC is set, fsync and fdatasync of any
 * file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void stall(void)
{
	const char *file = getenv("KMORPH_STALL");

	if (strcmp(program_invocation_short_name, "kmorphd"))
		return;
	while (file && !syscall(SYS_access, file, F_OK))
		usleep(5000);
}

static void stall_under(const char *path)
{
	const char *under = getenv("KMORPH_STALL_UNDER");

	if (under && path && !strncmp(path, under, strlen(under)))
		stall();
}

static void stall_sync(void)
{
	if (getenv("KMORPH_STALL_SYNC"))
		stall();
}

int fsync(int fd)
{
	stall_sync();
	return syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
	stall_sync();
	return syscall(SYS_fdatasync, fd);
}

ssize_t write(int fd, const void *buffer, size_t count)
{
	if (fd == STDERR_FILENO)
		stall();
	return syscall(SYS_write, fd, buffer, count);
}

int openat(int dir, const char *path, int flags, ...)
{
	va_list rest;
	mode_t mode;

	va_start(rest, flags);
	mode = va_arg(rest, mode_t);
	va_end(rest);
	stall_under(path);
	return syscall(SYS_openat, dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) __attribute__((alias("openat")));

int open(const char *path, int flags, ...)
{
	va_list rest;
	mode_t mode;

	va_start(rest, flags);
	mode = va_arg(rest, mode_t);
	va_end(rest);
	stall_under(path);
	return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) __attribute__((alias("open")));

int mkdir(const char *path, mode_t mode)
{
	stall_under(path);
	return syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int rename(const char *from, const char *to)
{
	stall_under(to);
	return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char *path)
{
	stall_under(path);
	return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
