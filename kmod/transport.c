// SPDX-License-Identifier: GPL-2.0
/*
 * The vsock transport. Connections, credit and buffers are virtio_transport_common's; here is only how a
 * packet finds its peer, and which sockets come here.
 *
 * The vsock core has one slot for each feature. A socket goes by its peer's CID: CID 1 and the own one to
 * the transport in the local slot, where there is one; up to 2, and all others where the host-to-guest
 * slot is empty, to guest-to-host; the rest to host-to-guest. So peer 0, the host, takes host-to-guest,
 * and every other peer guest-to-host.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>

#include "compat.h"
#include "kerf.h"

static u32 kerf_get_local_cid(void)
{
	struct kerf_device *dev;
	u32 cid = VMADDR_CID_ANY;

	rcu_read_lock();
	dev = rcu_dereference(kerf_the_device);
	if (dev)
		cid = kerf_cid(dev, dev->me);
	rcu_read_unlock();
	return cid;
}

static int kerf_send_pkt(KERF_PACKET_ARGUMENTS)
{
	struct virtio_vsock_hdr *hdr = virtio_vsock_hdr(skb);
	struct kerf_peer *peer = NULL;
	struct kerf_device *dev;
	int ret = -ENODEV;

	rcu_read_lock();
	dev = rcu_dereference(kerf_the_device);
	if (dev) {
		ret = -EHOSTUNREACH;
		peer = kerf_peer_by_cid(dev, le64_to_cpu(hdr->dst_cid));
	}
	/* The answer to a packet for CID 1 must come from CID 1, or the socket does not know its sender. */
	if (le64_to_cpu(hdr->dst_cid) == VMADDR_CID_LOCAL)
		hdr->src_cid = cpu_to_le64(VMADDR_CID_LOCAL);
	kerf_meter_count(skb);
	ret = peer ? kerf_peer_send(peer, skb) : kerf_drop(skb, ret);
	rcu_read_unlock();
	return ret;
}

static int kerf_cancel_pkt(struct vsock_sock *vsk)
{
	struct kerf_peer *peer = NULL;
	struct kerf_device *dev;

	rcu_read_lock();
	dev = rcu_dereference(kerf_the_device);
	if (dev)
		peer = kerf_peer_by_cid(dev, vsk->remote_addr.svm_cid);
	if (peer)
		kerf_peer_cancel(peer, vsk);
	rcu_read_unlock();
	return dev ? 0 : -ENODEV;
}

static int kerf_socket_init(struct vsock_sock *vsk, struct vsock_sock *listener)
{
	int ret = virtio_transport_do_socket_init(vsk, listener);

	if (ret)
		return ret;
	ret = kerf_meter_add(vsk);
	if (ret)
		virtio_transport_destruct(vsk);
	return ret;
}

static void kerf_destruct(struct vsock_sock *vsk)
{
	kerf_meter_remove(vsk);
	virtio_transport_destruct(vsk);
}

/*
 * No room, whatever its credit, while too much waits for the peer; kerf_transport_wake_writers() ends it. Nor for a
 * message while too many wait with the peer.
 */
static s64 kerf_stream_has_space(struct vsock_sock *vsk)
{
	struct kerf_peer *peer = NULL;
	struct kerf_device *dev;
	bool room = true;

	rcu_read_lock();
	dev = rcu_dereference(kerf_the_device);
	if (dev)
		peer = kerf_peer_by_cid(dev, vsk->remote_addr.svm_cid);
	if (peer)
		room = kerf_peer_has_room(peer);
	rcu_read_unlock();
	return room && kerf_meter_has_room(vsk) ? virtio_transport_stream_has_space(vsk) : 0;
}

static bool kerf_stream_allow(KERF_SOCK_AND u32 cid, u32 port)
{
	return KERF_NET_IS_SERVED;
}

static bool kerf_seqpacket_allow(KERF_SOCK_AND u32 remote_cid)
{
	return KERF_NET_IS_SERVED;
}

struct virtio_transport kerf_transport = {
	.transport = {
		.module = THIS_MODULE,

		.get_local_cid = kerf_get_local_cid,

		.init = kerf_socket_init,
		.destruct = kerf_destruct,
		.release = virtio_transport_release,
		.connect = virtio_transport_connect,
		.shutdown = virtio_transport_shutdown,
		.cancel_pkt = kerf_cancel_pkt,

		.dgram_bind = virtio_transport_dgram_bind,
		.dgram_dequeue = virtio_transport_dgram_dequeue,
		.dgram_enqueue = virtio_transport_dgram_enqueue,
		.dgram_allow = virtio_transport_dgram_allow,

		.stream_dequeue = virtio_transport_stream_dequeue,
		.stream_enqueue = virtio_transport_stream_enqueue,
		.stream_has_data = virtio_transport_stream_has_data,
		.stream_has_space = kerf_stream_has_space,
		.stream_rcvhiwat = virtio_transport_stream_rcvhiwat,
		.stream_is_active = virtio_transport_stream_is_active,
		.stream_allow = kerf_stream_allow,

		.seqpacket_dequeue = virtio_transport_seqpacket_dequeue,
		.seqpacket_enqueue = virtio_transport_seqpacket_enqueue,
		.seqpacket_allow = kerf_seqpacket_allow,
		.seqpacket_has_data = virtio_transport_seqpacket_has_data,

		.notify_poll_in = virtio_transport_notify_poll_in,
		.notify_poll_out = virtio_transport_notify_poll_out,
		.notify_recv_init = virtio_transport_notify_recv_init,
		.notify_recv_pre_block = virtio_transport_notify_recv_pre_block,
		.notify_recv_pre_dequeue = virtio_transport_notify_recv_pre_dequeue,
		.notify_recv_post_dequeue = virtio_transport_notify_recv_post_dequeue,
		.notify_send_init = virtio_transport_notify_send_init,
		.notify_send_pre_block = virtio_transport_notify_send_pre_block,
		.notify_send_pre_enqueue = virtio_transport_notify_send_pre_enqueue,
		.notify_send_post_enqueue = virtio_transport_notify_send_post_enqueue,
		.notify_buffer_size = virtio_transport_notify_buffer_size,
		KERF_TRANSPORT_LATER
		KERF_TRANSPORT_ZEROCOPY
		KERF_TRANSPORT_ROUTES
	},
	.send_pkt = kerf_send_pkt,
};

static int take(struct kerf_device *dev, int feature, const char *what)
{
	int ret = vsock_core_register(&kerf_transport.transport, feature);

	if (ret == -EBUSY)
		pr_notice("another vsock transport has the %s slot (lsmod shows it: vmw_vsock_virtio_transport, vhost_vsock, vsock_loopback, ...)\n",
			  what);
	if (!ret)
		dev->features |= feature;
	return ret;
}

int kerf_transport_register(struct kerf_device *dev)
{
	int ret;

	dev->features = 0;
	if (dev->backend->local_only)
		return take(dev, VSOCK_TRANSPORT_F_LOCAL, "local");
	if (kerf_cid(dev, dev->me) == VMADDR_CID_HOST)
		ret = take(dev, VSOCK_TRANSPORT_F_H2G, "host-to-guest");
	else
		ret = take(dev, VSOCK_TRANSPORT_F_G2H, "guest-to-host");
	if (ret)
		return ret;
	/* Without it CID 1 comes here through guest-to-host, or is the other transport's. */
	take(dev, VSOCK_TRANSPORT_F_LOCAL, "local");
	return 0;
}

void kerf_transport_unregister(struct kerf_device *dev)
{
	/* Sockets that are assigned to it stay so: they hold the module. */
	vsock_core_unregister(&kerf_transport.transport);
	dev->features = 0;
}

/* The argument of reset_sock() and wake_sock(), for which the core has no place. */
static DEFINE_MUTEX(kerf_each_mutex);
static u32 kerf_each_cid;

/* Under vsock_table_lock, so the socket stays; its own lock cannot be taken here. */
static void reset_sock(struct sock *sk)
{
	if (vsock_sk(sk)->remote_addr.svm_cid != kerf_each_cid)
		return;
	sk->sk_state = TCP_CLOSE;
	sk->sk_err = ECONNRESET;
	sk_error_report(sk);
}

/* Ends every connection to @cid: its peer is gone, and knows nothing of them. */
void kerf_transport_reset_peer(u32 cid)
{
	mutex_lock(&kerf_each_mutex);
	kerf_each_cid = cid;
	vsock_for_each_connected_socket(&kerf_transport.transport, reset_sock);
	mutex_unlock(&kerf_each_mutex);
}

/* Likewise. */
static void wake_sock(struct sock *sk)
{
	if (vsock_sk(sk)->remote_addr.svm_cid == kerf_each_cid)
		sk->sk_write_space(sk);
}

/* Less waits for the peer @cid than before: whoever found no room looks again. */
void kerf_transport_wake_writers(u32 cid)
{
	mutex_lock(&kerf_each_mutex);
	kerf_each_cid = cid;
	vsock_for_each_connected_socket(&kerf_transport.transport, wake_sock);
	mutex_unlock(&kerf_each_mutex);
}
