// SPDX-License-Identifier: GPL-2.0
/*
 * Makes the kernel fail in ways that /proc/sysrq-trigger does not offer, for tests of vmcores:
 * insmod failing.ko how=WAY, with a name in failing_ways[]. Most ways end in an oops; boot with oops=panic.
 */
#include <linux/delay.h>
#include <linux/irq_work.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/panic.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/timer.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

/* Exceeds the time until deferred work runs, milliseconds. */
#define FAILING_SOON_MS 10000
/* Not canonical. */
#define FAILING_WILD 0xdead000000000008UL

static char *how = "";
module_param(how, charp, 0);
MODULE_PARM_DESC(how, "the way to fail, see failing_ways[]");

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

static void failing_null(void)
{
	failing_read(NULL);
}

static void failing_wild(void)
{
	failing_read((struct nothing *)FAILING_WILD);
}

static void failing_bug(void)
{
	BUG();
}

static void failing_warn(void)
{
	WARN(1, "failing: a warning\n");
}

static void failing_divide(void)
{
	asm volatile("divl %2" : : "a"(1), "d"(0), "r"(0));
}

/* RSM is valid only in system management mode. */
static void failing_opcode(void)
{
	asm volatile("rsm");
}

static noinline int failing_recurse(int depth)
{
	char block[512];

	OPTIMIZER_HIDE_VAR(depth);
	memset(block, depth, sizeof(block));
	barrier_data(block);
	if (depth < 0)
		return block[0];
	return failing_recurse(depth + 1) + block[1];
}

static void failing_stack(void)
{
	failing_recurse(0);
}

static const long failing_constant = 1;

static void failing_rodata(void)
{
	long *constant = (long *)&failing_constant;

	OPTIMIZER_HIDE_VAR(constant);
	WRITE_ONCE(*constant, 2);
}

static void failing_nx(void)
{
	void (*data)(void) = kzalloc(64, GFP_KERNEL);

	if (data)
		data();
}

static void failing_panic(void)
{
	panic("failing: asked for");
}

static void failing_in_irq_work(struct irq_work *unused)
{
	failing_null();
}

static DEFINE_IRQ_WORK(failing_irq_work, failing_in_irq_work);

static void failing_irq(void)
{
	irq_work_queue(&failing_irq_work);
	msleep(FAILING_SOON_MS);
}

static void failing_in_timer(struct timer_list *unused)
{
	failing_null();
}

static DEFINE_TIMER(failing_timer, failing_in_timer);

static void failing_softirq(void)
{
	mod_timer(&failing_timer, jiffies + 1);
	msleep(FAILING_SOON_MS);
}

static int failing_in_thread(void *unused)
{
	failing_null();
	return 0;
}

static void failing_kthread(void)
{
	kthread_run(failing_in_thread, NULL, "failing");
	msleep(FAILING_SOON_MS);
}

static void failing_in_work(struct work_struct *unused)
{
	failing_null();
}

static DECLARE_WORK(failing_work, failing_in_work);

static void failing_workqueue(void)
{
	schedule_work(&failing_work);
	msleep(FAILING_SOON_MS);
}

static void failing_list(void)
{
	static LIST_HEAD(list);
	static LIST_HEAD(entry);

	list_add(&entry, &list);
	list_del(&entry);
	list_del(&entry);
}

static noinline void failing_smash(size_t bytes)
{
	char block[16];
	char *begin = block;

	OPTIMIZER_HIDE_VAR(begin);
	OPTIMIZER_HIDE_VAR(bytes);
	memset(begin, 'A', bytes);
	barrier_data(begin);
}

static void failing_protector(void)
{
	failing_smash(32);
}

/* Copies 64 bytes of an object of 32. The kernel checks the object before the address, which may be NULL. */
static void failing_usercopy(void)
{
	char *object = kzalloc(32, GFP_KERNEL);
	unsigned long bytes = 64;

	OPTIMIZER_HIDE_VAR(object);
	OPTIMIZER_HIDE_VAR(bytes);
	if (object && copy_to_user(NULL, object, bytes))
		pr_emerg("failing: this kernel does not check what is copied\n");
}

static void failing_free(void)
{
	void *object = kzalloc(96, GFP_KERNEL);
	void *again = object;

	OPTIMIZER_HIDE_VAR(again);
	kfree(object);
	kfree(again);
}

/* Interrupts stay enabled, so that the kernel's watchdogs fire. */
static void failing_loop(void)
{
	/* A grace period that this CPU then holds up. RCU's own thread begins it, on another CPU. */
	start_poll_synchronize_rcu();
	preempt_disable();
	for (;;)
		cpu_relax();
}

static void failing_wait(void)
{
	for (;;) {
		set_current_state(TASK_UNINTERRUPTIBLE);
		schedule();
	}
}

static void failing_hang(void)
{
	pr_emerg("failing: no CPU goes on from here\n");
	/* Newer kernels print on the console in a thread, which needs to run once more. */
	msleep(500);
	on_each_cpu(failing_spin, NULL, 0);
}

static void failing_cpu1(void)
{
	smp_call_function_single(1, failing_spin, NULL, 0);
}

static const struct {
	const char *name;
	void (*fail)(void);
} failing_ways[] = {
	{ "null", failing_null },	    /* reads address 8 */
	{ "wild", failing_wild },	    /* reads an address that is not canonical */
	{ "bug", failing_bug },		    /* BUG() */
	{ "warn", failing_warn },	    /* WARN(); needs panic_on_warn */
	{ "divide", failing_divide },	    /* divides by zero */
	{ "opcode", failing_opcode },	    /* an invalid instruction */
	{ "stack", failing_stack },	    /* calls itself until its stack ends */
	{ "rodata", failing_rodata },	    /* writes a constant */
	{ "nx", failing_nx },		    /* jumps into data */
	{ "panic", failing_panic },	    /* panic() */
	{ "irq", failing_irq },		    /* reads address 8 in an interrupt */
	{ "softirq", failing_softirq },	    /* reads address 8 in a timer */
	{ "kthread", failing_kthread },	    /* reads address 8 in a kernel thread */
	{ "work", failing_workqueue },	    /* reads address 8 in a workqueue */
	{ "list", failing_list },	    /* removes a list entry twice */
	{ "protector", failing_protector }, /* writes over the end of its stack frame */
	{ "usercopy", failing_usercopy },   /* copies past the end of an object to user space */
	{ "free", failing_free },	    /* frees an object twice */
	{ "loop", failing_loop },	    /* keeps the CPU; needs softlockup_panic or panic_on_rcu_stall */
	{ "wait", failing_wait },	    /* waits for ever; needs hung_task_panic */
	{ "hang", failing_hang },	    /* every CPU spins with interrupts disabled */
	{ "cpu1", failing_cpu1 },	    /* CPU 1 alone spins with interrupts disabled */
};

static int __init failing_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(failing_ways); i++) {
		if (!strcmp(how, failing_ways[i].name))
			failing_ways[i].fail();
	}
	return -EINVAL;
}
module_init(failing_init);

MODULE_DESCRIPTION("Ends the kernel, for tests");
MODULE_LICENSE("GPL");
