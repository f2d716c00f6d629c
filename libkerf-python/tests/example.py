"""What kerf's users know, typed: mypy reads this, and nobody runs it."""

from libkerf import DeviceTree, Instance, Kernel, Overlay, State

tree = DeviceTree.load("/var/lib/kerf/instances/web-server.dts")
instance = Instance.from_device_tree(tree)
for finding in instance.validate_resources().warnings:
    print(finding.rule, finding.property or finding.path, finding.problem)
path: str = str(instance.save())
instance = Instance.load("web-server")
status: dict[str, object] = instance.spawn(kernel="/boot/vmlinuz", workload=["kmorph-kv"])
with instance.monitor(heartbeat_timeout=5) as monitor:
    for event in monitor:
        print(event["message"])

kernel = Kernel()
state: State = kernel.state()
overlay: Overlay = state.allocate("db", cpus=4, memory=1 << 30)
number: int = kernel.apply(overlay).transaction
