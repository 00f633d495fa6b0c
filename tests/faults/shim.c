/* Calls back before and after every system call that changes or syncs files under one folder.

   A seccomp filter turns these calls into SIGSYS, whoever makes them: libc, stdio, libstdc++, or
   Rust code that never enters libc (safetensors renames its files so; a library loaded with
   LD_PRELOAD would not see that). The handler asks the hook what to do, makes the call itself
   through `shim_syscall`, which the filter lets pass, and puts the result where the kernel would.

   What the hook answers before a call: see `enum answer`; a positive number is an errno. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum answer { GO = 0, KILL_BEFORE = -1, KILL_AFTER = -2, KILL_INSIDE = -3, SHORT = -4 };

/* phase 0: before the call; size is what a write wants, offset where it will land.
   phase 1: after it; size is its result, or -errno. data is only there in phase 0. */
typedef int hook_type(int phase, const char *op, const char *path, const char *other, int fd,
                      const void *data, long size, long offset, long flags);

struct call {
    long number, argument[6];
    const char *op;
    char path[PATH_MAX], other[PATH_MAX];
    int fd;
    const void *data;
    long size, offset, flags;
    void *gathered; /* the parts of a writev as one, to be freed */
};

static hook_type *hook;
static char folder[PATH_MAX];
static pid_t thread; /* the one whose calls are hooked */
static int inside;   /* the hook's own calls pass */
static long elsewhere;

long shim_syscall(long number, long a, long b, long c, long d, long e, long f);
extern const char shim_syscall_end[];

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
__asm__(".text\n.globl shim_syscall\n.globl shim_syscall_end\nshim_syscall:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\n"
        "mov %r8, %r10\nmov %r9, %r8\nmov 8(%rsp), %r9\nsyscall\nshim_syscall_end:\nret\n");
static const int WHERE[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};
#define ARGUMENT(context, i) ((context)->uc_mcontext.gregs[WHERE[i]])
#define RESULT(context) ((context)->uc_mcontext.gregs[REG_RAX])
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
__asm__(".text\n.globl shim_syscall\n.globl shim_syscall_end\nshim_syscall:\n"
        "mov x8, x0\nmov x0, x1\nmov x1, x2\nmov x2, x3\nmov x3, x4\nmov x4, x5\nmov x5, x6\n"
        "svc #0\nshim_syscall_end:\nret\n");
#define ARGUMENT(context, i) ((context)->uc_mcontext.regs[i])
#define RESULT(context) ((context)->uc_mcontext.regs[0])
#else
#error "no system call convention for this processor"
#endif

static long pass(const struct call *c)
{
    const long *a = c->argument;
    return shim_syscall(c->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* The file a descriptor stands for, by its name now; empty if it has none. */
static void path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
}

static void resolve(int at, const char *name, char *path)
{
    char base[PATH_MAX] = "";
    if (name[0] != '/') {
        if (at != AT_FDCWD)
            path_of(at, base);
        else if (!getcwd(base, sizeof base))
            base[0] = 0;
    }
    if (base[0])
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    else
        snprintf(path, PATH_MAX, "%.4000s", name);
}

static int within(const char *path)
{
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static void named(struct call *c, const char *op, int at, long name, long flags)
{
    c->op = op, c->flags = flags;
    resolve(at, (const char *)name, c->path);
}

static void two_names(struct call *c, const char *op, int at, long name, int at2, long name2)
{
    named(c, op, at, name, 0);
    resolve(at2, (const char *)name2, c->other);
}

static void on_fd(struct call *c, const char *op)
{
    c->op = op, c->fd = (int)c->argument[0];
    path_of(c->fd, c->path);
}

static void writing(struct call *c, const void *data, long size, long offset)
{
    on_fd(c, "write");
    c->data = data, c->size = size, c->offset = offset;
    if (within(c->path) && offset < 0) {
        int append = fcntl(c->fd, F_GETFL) & O_APPEND;
        c->offset = lseek(c->fd, 0, append ? SEEK_END : SEEK_CUR);
    }
}

static void writing_parts(struct call *c, long offset)
{
    const struct iovec *parts = (const struct iovec *)c->argument[1];
    long size = 0, done = 0;
    for (long i = 0; i < c->argument[2]; i++)
        size += parts[i].iov_len;
    c->gathered = malloc(size + 1);
    for (long i = 0; i < c->argument[2]; done += parts[i++].iov_len)
        memcpy((char *)c->gathered + done, parts[i].iov_base, parts[i].iov_len);
    writing(c, c->gathered, size, offset);
}

/* What a call does, to which file. The filter has already let calls pass that only read. */
static void describe(struct call *c)
{
    const long *a = c->argument;
    switch (c->number) {
    case SYS_openat: named(c, "open", a[0], a[1], a[2]); break;
    case SYS_write: writing(c, (void *)a[1], a[2], -1); break;
    case SYS_pwrite64: writing(c, (void *)a[1], a[2], a[3]); break;
    case SYS_writev: writing_parts(c, -1); break;
    case SYS_pwritev: writing_parts(c, a[3]); break;
    case SYS_fsync:
    case SYS_fdatasync: on_fd(c, "fsync"); break;
    case SYS_ftruncate: on_fd(c, "truncate"), c->size = a[1]; break;
    case SYS_truncate: named(c, "truncate", AT_FDCWD, a[0], 0), c->size = a[1]; break;
    case SYS_fallocate: on_fd(c, "allocate"), c->offset = a[2], c->size = a[3]; break;
    case SYS_close: /* of what was open for writing; closing what was only read loses nothing */
        on_fd(c, "close");
        if ((fcntl(c->fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
            c->op = NULL;
        break;
    case SYS_mkdirat: named(c, "mkdir", a[0], a[1], 0); break;
    case SYS_unlinkat: named(c, a[2] & AT_REMOVEDIR ? "rmdir" : "unlink", a[0], a[1], 0); break;
    case SYS_linkat: two_names(c, "link", a[0], a[1], a[2], a[3]); break;
    case SYS_symlinkat: named(c, "symlink", a[1], a[2], 0); break;
    case SYS_renameat2: two_names(c, "rename", a[0], a[1], a[2], a[3]); break;
    case SYS_copy_file_range: on_fd(c, "copy"), c->fd = a[2], path_of(a[2], c->path); break;
    case SYS_sendfile: on_fd(c, "copy"); break;
    case SYS_mmap: c->op = "mmap", c->fd = a[4], path_of(a[4], c->path); break;
#ifdef SYS_renameat
    case SYS_renameat: two_names(c, "rename", a[0], a[1], a[2], a[3]); break;
#endif
#ifdef SYS_open
    case SYS_open: named(c, "open", AT_FDCWD, a[0], a[1]); break;
    case SYS_creat: named(c, "open", AT_FDCWD, a[0], O_CREAT | O_WRONLY | O_TRUNC); break;
    case SYS_mkdir: named(c, "mkdir", AT_FDCWD, a[0], 0); break;
    case SYS_unlink: named(c, "unlink", AT_FDCWD, a[0], 0); break;
    case SYS_rmdir: named(c, "rmdir", AT_FDCWD, a[0], 0); break;
    case SYS_rename: two_names(c, "rename", AT_FDCWD, a[0], AT_FDCWD, a[1]); break;
    case SYS_link: two_names(c, "link", AT_FDCWD, a[0], AT_FDCWD, a[1]); break;
    case SYS_symlink: named(c, "symlink", AT_FDCWD, a[1], 0); break;
#endif
    }
}

static void die(void)
{
    shim_syscall(SYS_kill, getpid(), SIGKILL, 0, 0, 0, 0);
    for (;;)
        pause();
}

/* Half of what a write wanted, at the place where it wanted it. */
static long half(const struct call *c)
{
    long size = c->size / 2;
    if (c->number == SYS_pwrite64 || c->number == SYS_pwritev)
        return shim_syscall(SYS_pwrite64, c->fd, (long)c->data, size, c->offset, 0, 0);
    return shim_syscall(SYS_write, c->fd, (long)c->data, size, 0, 0, 0);
}

static long hooked(struct call *c)
{
    inside = 1;
    int answer = hook(0, c->op, c->path, c->other, c->fd, c->data, c->size, c->offset, c->flags);
    inside = 0;
    if (answer == KILL_BEFORE)
        die();
    if (answer > 0) {
        if (c->number == SYS_close) /* a failing close closes */
            pass(c);
        return -answer;
    }
    int part = (answer == SHORT || answer == KILL_INSIDE) && c->data && c->size > 1;
    long result = part ? half(c) : pass(c);
    if (answer == KILL_AFTER || answer == KILL_INSIDE)
        die();
    inside = 1;
    hook(1, c->op, c->path, c->other, c->fd, NULL, result, c->offset, c->flags);
    inside = 0;
    return result;
}

static void on_call(int signal, siginfo_t *info, void *where)
{
    (void)signal;
    ucontext_t *context = where;
    int saved = errno;
    struct call c;
    c.number = info->si_syscall, c.op = NULL, c.fd = -1, c.data = NULL, c.gathered = NULL;
    c.size = 0, c.offset = -1, c.flags = 0, c.path[0] = c.other[0] = 0;
    for (int i = 0; i < 6; i++)
        c.argument[i] = ARGUMENT(context, i);
    if (!hook || inside) {
        RESULT(context) = pass(&c);
    } else {
        describe(&c);
        int ours = c.op && (within(c.path) || within(c.other));
        if (ours && gettid() != thread)
            elsewhere++, ours = 0;
        RESULT(context) = ours ? hooked(&c) : pass(&c);
        free(c.gathered);
    }
    errno = saved;
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define LOW(i) LOAD(args[i])
#define PASS BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define TRAP BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP)
#define IF(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (yes), (no))
#define ANY(bits, yes, no) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (bits), (yes), (no))
#define TRAPPED(number) IF(SYS_##number, 0, 1), TRAP
#define OPENED(number, i) IF(SYS_##number, 0, 4), LOW(i), ANY(CHANGES, 0, 1), TRAP, PASS
#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

/* From now on the calls of this process (and of its children) that can change files are hooked.
   Returns 0 or an errno. */
static int install_filter(void)
{
    unsigned long end = (unsigned long)shim_syscall_end;
    struct sock_filter rules[] = {
        LOAD(arch), IF(ARCHITECTURE, 1, 0), PASS,
        LOAD(instruction_pointer), IF((unsigned)end, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
        IF((unsigned)(end >> 32), 0, 1), PASS,
        LOAD(nr),
        TRAPPED(write), TRAPPED(pwrite64), TRAPPED(writev), TRAPPED(pwritev), TRAPPED(fsync),
        TRAPPED(fdatasync), TRAPPED(ftruncate), TRAPPED(truncate), TRAPPED(fallocate),
        TRAPPED(close), TRAPPED(mkdirat), TRAPPED(unlinkat), TRAPPED(linkat), TRAPPED(symlinkat),
        TRAPPED(renameat2), TRAPPED(copy_file_range), TRAPPED(sendfile),
#ifdef SYS_renameat
        TRAPPED(renameat),
#endif
#ifdef SYS_open
        TRAPPED(creat), TRAPPED(mkdir), TRAPPED(unlink), TRAPPED(rmdir), TRAPPED(rename),
        TRAPPED(link), TRAPPED(symlink), OPENED(open, 1),
#endif
        OPENED(openat, 2),
        IF(SYS_mmap, 0, 6), LOW(2), ANY(PROT_WRITE, 0, 3), LOW(3), ANY(MAP_SHARED, 0, 1), TRAP,
        PASS, PASS,
    };
    struct sock_fprog program = {sizeof rules / sizeof *rules, rules};
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return errno;
    return 0;
}

/* Calls `wanted` around the calls of this thread on files under `path` (absolute, no links). */
int shim_watch(const char *path, hook_type *wanted)
{
    snprintf(folder, sizeof folder, "%.4000s", path);
    thread = gettid();
    int failed = install_filter();
    if (!failed)
        hook = wanted;
    return failed;
}

/* After a fork: the thread that is left is the one to hook. */
void shim_forked(void)
{
    thread = gettid();
}

/* Calls of other threads under the folder, which are not hooked. */
long shim_elsewhere(void)
{
    return elsewhere;
}
