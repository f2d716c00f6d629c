// SPDX-License-Identifier: GPL-2.0
/*
 * QEMU's ivshmem-doorbell device: BAR 0 registers, BAR 2 the shared memory, an MSI-X vector for each peer
 * that may ring. A peer may ring without end: a vector that fires too often is muted for a while.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/pci.h>

#include "kerf.h"

#define IVSHMEM_VENDOR		0x1af4
#define IVSHMEM_DEVICE		0x1110
#define IVSHMEM_REGISTERS	0
#define IVSHMEM_MEMORY		2
#define IVSHMEM_POSITION	8
#define IVSHMEM_DOORBELL	12

/* Interrupts of one vector in one window before it is muted for the next one. */
#define IRQS_PER_WINDOW		2000
#define IRQ_WINDOW_MS		20

struct kerf_vector {
	struct kerf_ivshmem *ivshmem;
	unsigned int number;
	unsigned int irq;
	/* The handler's own, but for muted: that is handed to unmute. */
	unsigned long window;
	unsigned int count;
	bool muted;
	struct delayed_work unmute;
};

struct kerf_ivshmem {
	struct pci_dev *pdev;
	void __iomem *registers;
	void *memory;
	struct kerf_device *device;
	unsigned int vectors;
	unsigned int requested;
	struct kerf_vector vector[KERF_PEERS_MAX];
};

static void ivshmem_doorbell(struct kerf_device *dev, u32 peer)
{
	struct kerf_ivshmem *ivshmem = dev->backend_data;
	u32 vectors = le32_to_cpu(READ_ONCE(kerf_peer_entry(&dev->region, peer)->vectors));

	/* Whatever number the peer has written, the device refuses one that it does not have. */
	writel(peer << 16 | (dev->me % max(vectors, 1U) & 0xffff), ivshmem->registers + IVSHMEM_DOORBELL);
}

static const struct kerf_backend ivshmem_backend = {
	.name = "ivshmem",
	.doorbell = ivshmem_doorbell,
};

static irqreturn_t ivshmem_interrupt(int irq, void *data)
{
	struct kerf_vector *vector = data;
	struct kerf_device *dev = vector->ivshmem->device;
	u32 peer;

	if (time_after(jiffies, vector->window + msecs_to_jiffies(IRQ_WINDOW_MS))) {
		vector->window = jiffies;
		vector->count = 0;
	}
	if (++vector->count > IRQS_PER_WINDOW && !READ_ONCE(vector->muted)) {
		WRITE_ONCE(vector->muted, true);
		disable_irq_nosync(irq);
		schedule_delayed_work(&vector->unmute, msecs_to_jiffies(IRQ_WINDOW_MS));
	}
	for (peer = vector->number; peer < dev->region.peers; peer += vector->ivshmem->vectors)
		kerf_peer_kick(&dev->peers[peer]);
	return IRQ_HANDLED;
}

static void ivshmem_unmute(struct work_struct *work)
{
	struct kerf_vector *vector = container_of(to_delayed_work(work), struct kerf_vector, unmute);

	vector->count = 0;
	WRITE_ONCE(vector->muted, false);
	enable_irq(vector->irq);
}

static void release_interrupts(struct kerf_ivshmem *ivshmem)
{
	unsigned int i;

	for (i = 0; i < ivshmem->requested; i++) {
		struct kerf_vector *vector = &ivshmem->vector[i];

		/* Nothing mutes after the first, nothing enables after the second: it would be free by then. */
		disable_irq(vector->irq);
		cancel_delayed_work_sync(&vector->unmute);
		free_irq(vector->irq, vector);
	}
	ivshmem->requested = 0;
}

static int request_interrupts(struct kerf_ivshmem *ivshmem)
{
	unsigned int i;

	for (i = 0; i < ivshmem->vectors; i++) {
		struct kerf_vector *vector = &ivshmem->vector[i];
		int ret;

		*vector = (struct kerf_vector){
			.ivshmem = ivshmem,
			.number = i,
			.irq = pci_irq_vector(ivshmem->pdev, i),
			.window = jiffies,
		};
		INIT_DELAYED_WORK(&vector->unmute, ivshmem_unmute);
		ret = request_irq(vector->irq, ivshmem_interrupt, 0, KBUILD_MODNAME, vector);
		if (ret) {
			release_interrupts(ivshmem);
			return ret;
		}
		ivshmem->requested++;
	}
	return 0;
}

static int ivshmem_start(struct kerf_ivshmem *ivshmem)
{
	int ret = request_interrupts(ivshmem);

	if (ret)
		return ret;
	ret = kerf_device_start(ivshmem->device);
	if (ret)
		release_interrupts(ivshmem);
	return ret;
}

static void ivshmem_stop(struct kerf_ivshmem *ivshmem)
{
	release_interrupts(ivshmem);
	kerf_device_stop(ivshmem->device);
}

static int open_region(struct kerf_ivshmem *ivshmem, struct kerf_region *region)
{
	struct pci_dev *pdev = ivshmem->pdev;
	int ret;

	ret = kerf_region_open(region, ivshmem->memory, pci_resource_len(pdev, IVSHMEM_MEMORY));
	if (ret == -ENOENT)
		dev_info(&pdev->dev, "the shared memory has no kerf-vsock header; ignoring the device\n");
	else if (ret == -EPROTO)
		dev_err(&pdev->dev, "unsupported layout version in the shared memory\n");
	else if (ret)
		dev_err(&pdev->dev, "invalid peers, slots, bytes or size in the header of the shared memory\n");
	return ret;
}

static int ivshmem_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct kerf_ivshmem *ivshmem;
	struct kerf_region region;
	resource_size_t start, size;
	int ret;

	/* ivshmem-plain: memory without a doorbell. What it holds is not ours, and may look as if it were. */
	if (!pdev->msix_cap)
		return -ENODEV;
	ivshmem = devm_kzalloc(&pdev->dev, sizeof(*ivshmem), GFP_KERNEL);
	if (!ivshmem)
		return -ENOMEM;
	ivshmem->pdev = pdev;
	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	ret = pcim_iomap_regions(pdev, BIT(IVSHMEM_REGISTERS), KBUILD_MODNAME);
	if (ret)
		return ret;
	ivshmem->registers = pcim_iomap_table(pdev)[IVSHMEM_REGISTERS];
	start = pci_resource_start(pdev, IVSHMEM_MEMORY);
	size = pci_resource_len(pdev, IVSHMEM_MEMORY);
	if (!devm_request_mem_region(&pdev->dev, start, size, KBUILD_MODNAME))
		return -EBUSY;
	ivshmem->memory = devm_memremap(&pdev->dev, start, size, MEMREMAP_WB);
	if (IS_ERR(ivshmem->memory))
		return PTR_ERR(ivshmem->memory);
	ret = open_region(ivshmem, &region);
	if (ret)
		return ret == -ENOENT ? -ENODEV : ret;
	pci_set_master(pdev);
	ret = pci_alloc_irq_vectors(pdev, 1, region.peers, PCI_IRQ_MSIX);
	if (ret < 0) {
		dev_err(&pdev->dev, "no MSI-X vectors: use an ivshmem-doorbell device with vectors=N\n");
		return ret;
	}
	ivshmem->vectors = ret;
	ivshmem->device = kerf_device_create(&ivshmem_backend, ivshmem, &region,
					     readl(ivshmem->registers + IVSHMEM_POSITION), ivshmem->vectors);
	if (IS_ERR(ivshmem->device)) {
		ret = PTR_ERR(ivshmem->device);
		goto free_vectors;
	}
	ret = ivshmem_start(ivshmem);
	if (ret)
		goto destroy;
	pci_set_drvdata(pdev, ivshmem);
	return 0;
destroy:
	kerf_device_destroy(ivshmem->device);
free_vectors:
	pci_free_irq_vectors(pdev);
	return ret;
}

static void ivshmem_remove(struct pci_dev *pdev)
{
	struct kerf_ivshmem *ivshmem = pci_get_drvdata(pdev);

	ivshmem_stop(ivshmem);
	kerf_device_destroy(ivshmem->device);
	pci_free_irq_vectors(pdev);
}

/* The peers see us leave, and come back as a new generation. */
static int ivshmem_suspend(struct device *device)
{
	ivshmem_stop(dev_get_drvdata(device));
	return 0;
}

static int ivshmem_resume(struct device *device)
{
	return ivshmem_start(dev_get_drvdata(device));
}

static DEFINE_SIMPLE_DEV_PM_OPS(ivshmem_pm, ivshmem_suspend, ivshmem_resume);

static const struct pci_device_id ivshmem_ids[] = {
	{ PCI_DEVICE(IVSHMEM_VENDOR, IVSHMEM_DEVICE) },
	{}
};
MODULE_DEVICE_TABLE(pci, ivshmem_ids);

static struct pci_driver ivshmem_driver = {
	.name = "kerf-vsock",
	.id_table = ivshmem_ids,
	.probe = ivshmem_probe,
	.remove = ivshmem_remove,
	.driver.pm = pm_sleep_ptr(&ivshmem_pm),
};

int kerf_ivshmem_init(void)
{
	return pci_register_driver(&ivshmem_driver);
}

void kerf_ivshmem_exit(void)
{
	pci_unregister_driver(&ivshmem_driver);
}
