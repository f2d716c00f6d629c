/* SPDX-License-Identifier: GPL-2.0 */
#ifndef KERF_KMP_H
#define KERF_KMP_H

#include "kerf_port.h"

#define KMP_HEADER_SIZE		32
/* Longest payload that is stored: HELLO's limit. */
#define KMP_PAYLOAD_MAX		1024
/* Longest answer: HELLO's reply with the longest texts. */
#define KMP_REPLY_MAX		320
#define KMP_INSTANCE_MAX	63
#define KMP_RELEASE_MAX		64

/* The identity of this kernel: module parameters. */
struct kerf_kmp_identity {
	char instance[KMP_INSTANCE_MAX + 1];
	u64 generation;
	u8 boot_id[16];
	char release[KMP_RELEASE_MAX + 1];
};

struct kerf_kmp_figures {
	u16 cpus;
	u64 memory_total_kib;
	u64 memory_available_kib;
	u64 boottime_ns;
};

enum kerf_kmp_result {
	KMP_MORE = 0,	/* all input was taken; wait for more */
	KMP_REPLY = 1,	/* send the reply; input may be left */
	KMP_CLOSE = 2,	/* send the reply if there is one, and close */
};

/* One connection. Zeroed is new. */
struct kerf_kmp {
	bool greeted;
	u32 have;
	u32 reply_len;
	u8 frame[KMP_HEADER_SIZE + KMP_PAYLOAD_MAX];
	u8 reply[KMP_REPLY_MAX];
};

enum kerf_kmp_result kerf_kmp_feed(struct kerf_kmp *k, const struct kerf_kmp_identity *id,
				   const struct kerf_kmp_figures *figures, const u8 **data, u32 *len);

#endif /* KERF_KMP_H */
