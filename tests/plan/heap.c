/* Counts the bytes of all blocks of a page or more that the threads of a process have allocated; for glibc. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);
static atomic_long used, peak;

static long measure(void *block) {
  size_t size = block ? malloc_usable_size(block) : 0;
  return size < 4096 ? 0 : size;
}
static void *add(void *block) {
  long size = measure(block), before = atomic_load(&peak);
  long now = atomic_fetch_add(&used, size) + size;
  while (now > before && !atomic_compare_exchange_weak(&peak, &before, now)) {
  }
  return block;
}
static void leave(void *block) { atomic_fetch_sub(&used, measure(block)); }

void *malloc(size_t size) { return add(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return add(__libc_calloc(count, size)); }
void *realloc(void *block, size_t size) {
  leave(block);
  return add(__libc_realloc(block, size));
}
void *memalign(size_t unit, size_t size) { return add(__libc_memalign(unit, size)); }
void *aligned_alloc(size_t unit, size_t size) { return memalign(unit, size); }
int posix_memalign(void **block, size_t unit, size_t size) { return (*block = memalign(unit, size)) ? 0 : ENOMEM; }
void free(void *block) {
  leave(block);
  __libc_free(block);
}

/* Returns the bytes in use, which are the peak from now on. */
long begin_count(void) {
  long now = atomic_load(&used);
  atomic_store(&peak, now);
  return now;
}
long get_peak(void) { return atomic_load(&peak); }
