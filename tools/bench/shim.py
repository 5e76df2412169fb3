"""A library that stands before libc in a process: failing storage, a full disk, another clock.

It is made with gcc and loaded with LD_PRELOAD. Environment variables say what it does:

    FAIL_READS=SWITCH  [READS_OF=PART]   EIO for reads of files with PART in their path (".tar"),
                                         while the file SWITCH is there
    FAIL_WRITES=PART                     EIO for writes and syncs of files with PART in their path
    FILL_AT=PART  FILL_FILE=BALLAST      before a file with PART in its path is opened for writing,
                                         the disk of BALLAST is filled to its last byte, once
    MOVE_CLOCK=SWITCH  CLOCK_DAYS=N      another wall clock, while the file SWITCH is there
"""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
static int on(const char *name) { char *file = getenv(name); return file && !access(file, F_OK); }
static int is_of(int fd, const char *part) {
  char link[64], path[4096]; snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 1) return 0; path[n] = 0; return strstr(path, part) != NULL; }
static int bad_read(int fd) {
  if (!on("FAIL_READS")) return 0;
  char *part = getenv("READS_OF");
  if (!is_of(fd, part ? part : ".tar")) return 0;
  errno = EIO; return 1; }
static int bad_write(int fd) {
  char *part = getenv("FAIL_WRITES");
  if (!part || !is_of(fd, part)) return 0;
  errno = EIO; return 1; }
static void fill(const char *path, int flags) {
  char *part = getenv("FILL_AT"), *ballast = getenv("FILL_FILE"); static char block[1 << 16];
  if (!part || !ballast || !(flags & (O_WRONLY | O_RDWR)) || !strstr(path, part)) return;
  int fd = syscall(SYS_openat, AT_FDCWD, ballast, O_CREAT | O_EXCL | O_WRONLY, 0600);
  if (fd < 0) return;
  for (size_t size = sizeof block; size; size /= 2) while (syscall(SYS_write, fd, block, size) > 0);
  close(fd); }
#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = dlsym(RTLD_NEXT, #name)
#define MOVE(name, bad, buffer, offset) \
ssize_t name(int fd, buffer data, size_t n, offset at) { \
  REAL(ssize_t, name, int, buffer, size_t, offset); return bad(fd) ? -1 : real(fd, data, n, at); }
MOVE(pread, bad_read, void *, off_t)
MOVE(pread64, bad_read, void *, off64_t)
MOVE(pwrite, bad_write, const void *, off_t)
MOVE(pwrite64, bad_write, const void *, off64_t)
ssize_t read(int fd, void *data, size_t n) {
  REAL(ssize_t, read, int, void *, size_t); return bad_read(fd) ? -1 : real(fd, data, n); }
ssize_t write(int fd, const void *data, size_t n) {
  REAL(ssize_t, write, int, const void *, size_t); return bad_write(fd) ? -1 : real(fd, data, n); }
ssize_t writev(int fd, const struct iovec *data, int n) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  return bad_write(fd) ? -1 : real(fd, data, n); }
size_t fread(void *data, size_t size, size_t n, FILE *file) {
  REAL(size_t, fread, void *, size_t, size_t, FILE *);
  return bad_read(fileno(file)) ? 0 : real(data, size, n, file); }
size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
  REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
  return bad_write(fileno(file)) ? 0 : real(data, size, n, file); }
int fsync(int fd) { REAL(int, fsync, int); return bad_write(fd) ? -1 : real(fd); }
#define OPEN(name) int name(const char *path, int flags, ...) { \
  va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
  REAL(int, name, const char *, int, ...); fill(path, flags); return real(path, flags, mode); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { \
  va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
  REAL(int, name, int, const char *, int, ...); fill(path, flags); \
  return real(at, path, flags, mode); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(int, clock_gettime, clockid_t, struct timespec *);
  int code = real(clock, now);
  int moves = clock == CLOCK_REALTIME && on("MOVE_CLOCK");
  if (moves) now->tv_sec += 86400 * atol(getenv("CLOCK_DAYS"));
  return code; }
"""


def make(folder: Path) -> Path:
    """Compile the library in a folder, and return its path."""
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SOURCE)
    words = ["gcc", "-w", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(words, check=True)
    return library
