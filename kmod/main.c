// SPDX-License-Identifier: GPL-2.0
/* kerf-vsock: AF_VSOCK between kernels over shared memory. docs/kerf-vsock.md describes it. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/moduleparam.h>

#include "kerf.h"

static char *backend = "ivshmem";
module_param(backend, charp, 0444);
MODULE_PARM_DESC(backend, "how peers are reached: ivshmem (default), loopback, multikernel");

static int start_backend(void)
{
	if (!strcmp(backend, "ivshmem"))
		return kerf_ivshmem_init();
	if (!strcmp(backend, "loopback"))
		return kerf_loopback_init();
	if (!strcmp(backend, "multikernel"))
		return kerf_multikernel_init();
	pr_err("invalid backend %s: use ivshmem, loopback or multikernel\n", backend);
	return -EINVAL;
}

static void stop_backend(void)
{
	if (!strcmp(backend, "ivshmem"))
		kerf_ivshmem_exit();
	else if (!strcmp(backend, "loopback"))
		kerf_loopback_exit();
	else
		kerf_multikernel_exit();
}

static int __init kerf_init(void)
{
	int ret = kerf_heartbeat_init();

	if (ret)
		return ret;
	kerf_debugfs_init();
	ret = start_backend();
	if (ret) {
		kerf_debugfs_exit();
		return ret;
	}
	kerf_panic_init();
	return 0;
}

/* No socket is assigned to the transport any more: each one holds the module. */
static void __exit kerf_exit(void)
{
	kerf_panic_exit();
	stop_backend();
	kerf_debugfs_exit();
}

module_init(kerf_init);
module_exit(kerf_exit);
MODULE_LICENSE("GPL");
MODULE_AUTHOR("The kmorph authors");
MODULE_DESCRIPTION("vsock between kernels over shared memory and interrupts");
MODULE_ALIAS_NETPROTO(PF_VSOCK);
