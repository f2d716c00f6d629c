// SPDX-License-Identifier: GPL-2.0
/*
 * Ends a kernel in ways that /proc/sysrq-trigger has not, for tests of vmcores:
 *
 *   insmod failing.ko how=null    reads address 8: an oops, a panic with oops=panic
 *   insmod failing.ko how=hang    every CPU spins with interrupts off, for ever
 *   insmod failing.ko how=cpu1    CPU 1 does, and no other
 */
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/smp.h>

static char *how = "";
module_param(how, charp, 0);
MODULE_PARM_DESC(how, "null, hang or cpu1");

struct nothing {
	long first;
	long second;
};

static noinline long failing_read(struct nothing *nothing)
{
	return READ_ONCE(nothing->second);
}

static noinline void failing_spin(void *unused)
{
	local_irq_disable();
	for (;;)
		cpu_relax();
}

static int __init failing_init(void)
{
	if (!strcmp(how, "null"))
		return failing_read(NULL);
	if (!strcmp(how, "hang")) {
		pr_emerg("failing: no CPU goes on from here\n");
		/* Newer kernels print on the console in a thread, which has to run once more. */
		msleep(500);
		on_each_cpu(failing_spin, NULL, 0);
	}
	if (!strcmp(how, "cpu1"))
		smp_call_function_single(1, failing_spin, NULL, 0);
	return -EINVAL;
}
module_init(failing_init);

MODULE_DESCRIPTION("Ends the kernel, for tests");
MODULE_LICENSE("GPL");
