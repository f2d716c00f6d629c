// SPDX-License-Identifier: GPL-2.0
/*
 * What messages cost their receiver besides their bytes.
 *
 * Credit pays for bytes, but each packet also costs its receiver a buffer, and messages are not merged as the
 * packets of a stream are. A vsock core that bounds what buffers cost resets the connection (6.12.95: as many
 * buffers as buf_alloc pays for at 576 bytes each). So a sender counts the packets that its peer has not read yet,
 * and begins no further message while they cost more than the peer's buf_alloc.
 *
 * The peer says how many bytes it has read. Packets are counted in batches, so that a socket needs little memory for
 * it: a batch is over when the last of its bytes was read.
 */
#include <linux/hashtable.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "kerf.h"

/* Batches of a socket: the count is too high by one batch at most. */
#define BATCHES		32
/* Places of the table of sockets: a power of two, as an exponent. */
#define METERS_BITS	8

struct batch {
	u32 end;	/* behind its last byte, in the peer's count */
	u32 packets;
};

/* Of one socket for messages. */
struct kerf_meter {
	struct hlist_node node;
	struct vsock_sock *vsk;
	struct batch batches[BATCHES];
	u32 first, count;	/* of the batches */
	u32 packets;		/* in all of them */
	bool within;		/* a message that was begun has not ended */
};

static DEFINE_HASHTABLE(meters, METERS_BITS);
static DEFINE_SPINLOCK(meters_lock);

static struct kerf_meter *meter_of(struct vsock_sock *vsk)
{
	struct kerf_meter *meter;

	hash_for_each_possible(meters, meter, node, (unsigned long)vsk)
		if (meter->vsk == vsk)
			return meter;
	return NULL;
}

/* A socket that comes to this transport. */
int kerf_meter_add(struct vsock_sock *vsk)
{
	struct kerf_meter *meter;

	if (sk_vsock(vsk)->sk_type != SOCK_SEQPACKET)
		return 0;
	meter = kzalloc(sizeof(*meter), GFP_KERNEL);
	if (!meter)
		return -ENOMEM;
	meter->vsk = vsk;
	spin_lock_bh(&meters_lock);
	hash_add(meters, &meter->node, (unsigned long)vsk);
	spin_unlock_bh(&meters_lock);
	return 0;
}

void kerf_meter_remove(struct vsock_sock *vsk)
{
	struct kerf_meter *meter;

	spin_lock_bh(&meters_lock);
	meter = meter_of(vsk);
	if (meter)
		hash_del(&meter->node);
	spin_unlock_bh(&meters_lock);
	kfree(meter);
}

/* What the socket has sent and what its peer has read and has room for, in bytes; the first two wrap. */
struct credit {
	u32 sent, read, room;
};

static struct credit credit_of(struct vsock_sock *vsk)
{
	struct virtio_vsock_sock *vvs = vsk->trans;
	struct credit credit;

	spin_lock_bh(&vvs->tx_lock);
	credit = (struct credit){
		.sent = vvs->tx_cnt,
		.read = vvs->peer_fwd_cnt,
		.room = vvs->peer_buf_alloc,
	};
	spin_unlock_bh(&vvs->tx_lock);
	return credit;
}

/* Packets that may wait with a peer that has so much room. */
static u32 packets_max(const struct credit *credit)
{
	return clamp_t(u32, credit->room / KERF_PACKET_COST, 1, KERF_UNREAD_MAX);
}

/* meters_lock held, as for what follows. */
static void forget_read(struct kerf_meter *meter, const struct credit *credit)
{
	while (meter->count && (s32)(credit->read - meter->batches[meter->first].end) >= 0) {
		meter->packets -= meter->batches[meter->first].packets;
		meter->first = (meter->first + 1) % BATCHES;
		meter->count--;
	}
}

static void add(struct kerf_meter *meter, const struct credit *credit, u32 packets)
{
	struct batch *last = &meter->batches[(meter->first + meter->count - 1) % BATCHES];

	if (!meter->count || (last->packets >= packets_max(credit) / BATCHES && meter->count < BATCHES)) {
		last = &meter->batches[(meter->first + meter->count) % BATCHES];
		last->packets = 0;
		meter->count++;
	}
	last->end = credit->sent;
	last->packets += packets;
	meter->packets += packets;
}

/* Counts what is sent of a message. */
void kerf_meter_count(struct sk_buff *skb)
{
	const struct virtio_vsock_hdr *hdr = virtio_vsock_hdr(skb);
	struct kerf_meter *meter;
	struct vsock_sock *vsk;
	struct credit credit;

	if (le16_to_cpu(hdr->type) != VIRTIO_VSOCK_TYPE_SEQPACKET || le16_to_cpu(hdr->op) != VIRTIO_VSOCK_OP_RW ||
	    !skb->sk)
		return;
	vsk = vsock_sk(skb->sk);
	credit = credit_of(vsk);
	spin_lock_bh(&meters_lock);
	meter = meter_of(vsk);
	if (meter) {
		forget_read(meter, &credit);
		add(meter, &credit, DIV_ROUND_UP(skb->len, KERF_PAYLOAD_MAX));
		meter->within = !(le32_to_cpu(hdr->flags) & VIRTIO_VSOCK_SEQ_EOM);
	}
	spin_unlock_bh(&meters_lock);
}

/*
 * Whether the socket may send. The rest of a message always may, as far as its credit reaches: the peer's program
 * reads nothing of it before it is whole. The peer's next CREDIT_UPDATE wakes whoever waits.
 */
bool kerf_meter_has_room(struct vsock_sock *vsk)
{
	struct kerf_meter *meter;
	struct credit credit;
	bool room = true;

	if (sk_vsock(vsk)->sk_type != SOCK_SEQPACKET)
		return true;
	credit = credit_of(vsk);
	spin_lock_bh(&meters_lock);
	meter = meter_of(vsk);
	if (meter && !meter->within) {
		forget_read(meter, &credit);
		room = meter->packets < packets_max(&credit);
	}
	spin_unlock_bh(&meters_lock);
	return room;
}
