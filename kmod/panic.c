// SPDX-License-Identifier: GPL-2.0
/* Tells the peers that this kernel panics, with the reason, while it still can. */
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/panic_notifier.h>

#include "kerf.h"

/* Other CPUs may have stopped anywhere, with any lock held: only stores and, where it is one, a doorbell. */
static int kerf_panicking(struct notifier_block *block, unsigned long event, void *reason)
{
	struct kerf_device *dev;
	u32 i;

	rcu_read_lock();
	dev = rcu_dereference(kerf_the_device);
	if (dev) {
		const char *text = reason ? reason : "";

		kerf_detach(&dev->region, dev->me, dev->generation, KERF_PEER_PANICKED, text,
			    strnlen(text, KERF_REASON_MAX));
		for (i = 0; i < dev->region.peers; i++)
			if (i != dev->me && !dev->backend->doorbell_sleeps)
				dev->backend->doorbell(dev, i);
	}
	rcu_read_unlock();
	return NOTIFY_DONE;
}

static struct notifier_block kerf_panic_block = {
	.notifier_call = kerf_panicking,
};

void kerf_panic_init(void)
{
	atomic_notifier_chain_register(&panic_notifier_list, &kerf_panic_block);
}

void kerf_panic_exit(void)
{
	atomic_notifier_chain_unregister(&panic_notifier_list, &kerf_panic_block);
}
