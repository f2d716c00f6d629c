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

/*
 * Since 6.7 a program can ask that its memory be sent without a copy. It is copied once, into the ring, and the
 * program is told when that is done.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
static inline bool kerf_msgzerocopy_allow(void)
{
	return true;
}

#define KERF_TRANSPORT_ZEROCOPY .msgzerocopy_allow = kerf_msgzerocopy_allow,
#else
#define KERF_TRANSPORT_ZEROCOPY
#endif

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

/*
 * Since 7.0 sockets and packets belong to network namespaces. What comes from a peer kernel belongs to none: as
 * virtio-vsock does, the transport serves the namespaces of the global mode.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define KERF_PACKET_ARGUMENTS struct sk_buff *skb, struct net *net
#define KERF_SOCK_AND struct vsock_sock *vsk,
#define KERF_NET_IS_SERVED vsock_net_mode_global(vsk)
#define virtio_transport_recv_pkt(t, skb) virtio_transport_recv_pkt(t, skb, NULL)
#else
#define KERF_PACKET_ARGUMENTS struct sk_buff *skb
#define KERF_SOCK_AND
#define KERF_NET_IS_SERVED true
#endif

/*
 * Since 7.1 the core asks whether a transport reaches a CID above 2, where it went to the one transport of its slot
 * before: kerf_send_pkt() refuses what has no peer.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 1, 0)
static inline bool kerf_has_remote_cid(struct vsock_sock *vsk, u32 remote_cid)
{
	return true;
}

#define KERF_TRANSPORT_ROUTES .has_remote_cid = kerf_has_remote_cid,
#else
#define KERF_TRANSPORT_ROUTES
#endif

#endif /* KERF_COMPAT_H */
