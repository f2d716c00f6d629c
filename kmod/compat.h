/* SPDX-License-Identifier: GPL-2.0 */
/* What differs between the kernels that the module is built for, 6.1 and later. */
#ifndef KERF_COMPAT_H
#define KERF_COMPAT_H

#include <linux/version.h>
#include <linux/virtio_vsock.h>

/* A packet has left: since 6.11 the socket counts what was not sent yet. */
static inline void kerf_consume_sent(struct sk_buff *skb)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	virtio_transport_consume_skb_sent(skb, true);
#else
	consume_skb(skb);
#endif
}

/* Operations that later kernels have besides. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
#define KERF_TRANSPORT_LATER						\
	.unsent_bytes = virtio_transport_unsent_bytes,			\
	.notify_set_rcvlowat = virtio_transport_notify_set_rcvlowat,	\
	.read_skb = virtio_transport_read_skb,
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
#define KERF_TRANSPORT_LATER						\
	.read_skb = virtio_transport_read_skb,
#else
#define KERF_TRANSPORT_LATER
#endif

#endif /* KERF_COMPAT_H */
