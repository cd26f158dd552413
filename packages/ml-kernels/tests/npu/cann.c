/* What torch_npu asks of CANN before it believes in a device, answered without one.

   `npu_stubs.py` adds a function that returns 0 (success) for every other name. One device, host
   memory in place of device memory, streams and events that are done at once. No kernel computes
   anything: values come from `npu_simulator.py`. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 512, HANDLE = 64, NAME = 128 };

static int new_handle(void **handle) {
  *handle = malloc(HANDLE);
  return *handle == NULL;
}

static int allocate(void **pointer, size_t size) {
  return posix_memalign(pointer, ALIGNMENT, size ? size : ALIGNMENT);
}

/* Device */

static __thread int32_t device;

int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtGetDevice(int32_t *id) { *id = device; return 0; }
int aclrtSetDevice(int32_t id) { device = id; return 0; }
int aclrtGetCurrentContext(void **context) { return new_handle(context); }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t from, int32_t to) { *can = 1; return 0; }
int aclGetDeviceCapability(uint32_t id, int what, int64_t *cores) { *cores = 24; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return ""; }

int aclrtGetPrimaryCtxState(int32_t id, uint32_t *flags, int32_t *active) {
  *flags = 0;
  *active = 1;
  return 0;
}

/* Versions and options */

int aclsysGetVersionStr(char *package, char *version) { strcpy(version, "8.5.0"); return 0; }
int aclsysGetCANNVersion(int package, char *version) { strcpy(version, "8.5.0"); return 0; }
int aclGetCannAttributeList(const void **list, size_t *size) { *size = 0; return 0; }
size_t aclGetCompileoptSize(int option) { return HANDLE; }
int aclGetCompileopt(int option, char *value, size_t size) { strncpy(value, "enable", size); return 0; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return 0; }

/* Memory */

int aclrtMalloc(void **pointer, size_t size, int policy) { return allocate(pointer, size); }
int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return allocate(pointer, size); }
int aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
int aclrtMallocHostWithCfg(void **pointer, size_t size, void *config) { return allocate(pointer, size); }
int aclrtFree(void *pointer) { free(pointer); return 0; }
int aclrtFreeHost(void *pointer) { free(pointer); return 0; }

int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
  memmove(to, from, size);
  return 0;
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
  memmove(to, from, size);
  return 0;
}

int aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
  memset(to, value, size);
  return 0;
}

int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, void *stream) {
  memset(to, value, size);
  return 0;
}

int aclrtGetMemInfo(int attribute, size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = (size_t)60 << 30;
  *total_bytes = (size_t)64 << 30;
  return 0;
}

/* Streams and events */

int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) {
  return new_handle(stream);
}
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 0; return 0; }
int aclrtStreamQuery(void *stream, int32_t *pending) { *pending = 0; return 0; }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { *flag = 0; return 0; }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return new_handle(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return new_handle(event); }
int aclrtQueryEventStatus(void *event, int32_t *done) { *done = 1; return 0; }
int aclrtQueryEventWaitStatus(void *event, int32_t *done) { *done = 1; return 0; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return 0; }

/* Communicators, named in the order in which a process makes them */

static int communicators;

int HcclCommInitRootInfoConfig(uint32_t ranks, void *root, uint32_t rank, void *config, void **made) {
  int *number = malloc(sizeof *number);
  *number = communicators++;
  *made = number;
  return 0;
}

int HcclCommInitRootInfo(uint32_t ranks, void *root, uint32_t rank, void **made) {
  return HcclCommInitRootInfoConfig(ranks, root, rank, NULL, made);
}

int HcclGetCommName(const int *communicator, char *name) {
  snprintf(name, NAME, "hccl_group_%d", *communicator);
  return 0;
}
