#!/bin/sh
# The guest's init. The test reads its output: "== NAME" begins the results of NAME.
if [ "$1" != piped ]; then
    # kmorphctl shows no progress if its output is not a terminal.
    sh /init piped 2>&1 | cat
    poweroff -f
fi
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ifconfig lo 127.0.0.1 up
export PATH=/bin:/usr/bin
cg=/sys/fs/cgroup
top=$cg/kmorph/run-kmorph
instances=/run/kmorph/instances

found() { echo "== $1"; }
# Shows where the guest is stuck: the test has a deadline and prints this output.
step() { found "step: $*"; }
# Enters cgroups, one after the other, and executes a program.
in_cgroups() {
    (
        while [ "$1" != -- ]; do
            sh -c 'echo $PPID' >$1/cgroup.procs || exit 1
            shift
        done
        shift
        exec "$@"
    )
}
start() { in_cgroups "$@" -- kmorphctl daemon start; }
backend() { kmorphctl daemon status | grep embedded; }
recoveries() { kmorphctl --output-format json recovery-log --instance $1; }
say() { printf "$1\r\nQUIT\r\n" | nc 127.0.0.1 6379 | tr -d '\r'; }
agent() { sed 's/ .*//' $instances/$1/agent.birth; }

# Allocates private memory without end, after a signal by a file.
cat >/hog <<'HOG'
#!/bin/sh
until [ -e /tmp/go ]; do sleep 0.1; done
rm /tmp/go
sh -c 'while true; do sleep 1; done' &
tail /dev/zero
HOG
chmod 755 /hog
hog() { kmorphctl spawn hog --kernel=/kernel --memory=64M --workload=/hog; }

step a session of root, without delegation
mkdir $cg/session
start $cg/session
found held
backend
hog
kmorphctl spawn kv --kernel=/kernel --memory=32M --workload=kmorph-kv --publish=6379:6379
say 'SET k v'
found limits
for file in memory.max memory.swap.max memory.oom.group; do
    echo "$file $(cat $top/hog.1/workload/$file)"
done
found hog
agent=$(agent hog/1)
touch /tmp/go
until recoveries hog | grep -q recovered; do sleep 0.1; done
recoveries hog
found hog-status
kmorphctl --output-format json status hog
found agent-lives
[ "$agent" = "$(agent hog/1)" ] && kill -0 $agent && echo yes
found neighbour
say 'GET k'
kmorphctl --output-format json status kv

step more is written than the server may use
head -c 1048576 /dev/zero | tr '\0' x >/tmp/mib
for n in $(seq 28); do
    printf '*3\r\n$3\r\nSET\r\n$3\r\nk%02d\r\n$1048576\r\n' $n
    cat /tmp/mib
    printf '\r\n'
done >/tmp/fill
printf 'QUIT\r\n' >>/tmp/fill
found fill
nc 127.0.0.1 6379 </tmp/fill | tr -d '\r' | sort | uniq -c
rm /tmp/fill
found full-status
kmorphctl --output-format json status kv

step another daemon
kill -9 $(pidof kmorphd)
start $cg/session
touch /tmp/go
until [ $(recoveries hog | grep -c recovered) = 2 ]; do sleep 0.1; done
found adopted
say 'GET k'
recoveries hog

step a morph
kmorphctl morph kv --kernel=/kernel --auto-commit --force
found morphed
say 'GET k'
until [ ! -e $top/kv.1 ]; do sleep 0.1; done
echo "own $(cat $top/kv.2/workload/memory.current)"
echo "daemon $(cat $top/memory.current)"
kmorphctl terminate hog
kmorphctl terminate kv
found left
find $cg -name '*kmorph*'
step the daemon stops
kmorphctl daemon stop

step a unit of systemd with Delegate=yes and DelegateSubgroup=daemon
unit=$cg/system.slice/kmorphd.service
mkdir -p $unit/daemon
echo +memory >$cg/cgroup.subtree_control
echo +memory >$cg/system.slice/cgroup.subtree_control
delegated $unit
start $unit $unit/daemon
found delegated
backend
hog
echo "enabled '$(cat $unit/cgroup.subtree_control)'"
agent=$(agent hog/*)
grep 'Max data size' /proc/$agent/limits
cat /proc/$agent/cgroup
found delegated-again
kill -9 $(pidof kmorphd)
start $unit $unit/daemon
kmorphctl --output-format json status hog
kmorphctl terminate hog
kmorphctl daemon stop
found why
echo +memory >$unit/cgroup.subtree_control && in_cgroups $unit -- echo entered 2>&1

step a workload of another kmorph, which others run beside
other=$cg/kmorph/run-other/web.1/workload
mkdir -p $other
for above in $cg/kmorph $cg/kmorph/run-other $cg/kmorph/run-other/web.1; do
    echo +memory >$above/cgroup.subtree_control
done
start $other
found nested
backend
kmorphctl daemon stop

step where the controller is not enabled
bare=$cg/bare/kmorph/web.1
mkdir -p $bare
start $bare
found bare
backend
kmorphctl daemon stop

found end
