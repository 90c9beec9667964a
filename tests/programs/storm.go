// Create and close restricted descriptors from goroutines, which Go's runtime
// preempts by signals; says what went wrong, and exits with 1.
package main

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
)

func opened() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	return len(entries)
}

func main() {
	count, _ := strconv.Atoi(os.Args[1])
	const workers = 8
	var failures atomic.Int64
	var group sync.WaitGroup
	before := opened()
	for worker := 0; worker < workers; worker++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := 0; i < count/workers; i++ {
				fd, _, errno := syscall.Syscall(451, 0, 0, 0)
				var found syscall.Stat_t
				if errno != 0 || syscall.Fstat(int(fd), &found) != nil || found.Size != 0 {
					failures.Add(1)
				} else {
					syscall.Close(int(fd))
				}
			}
		}()
	}
	// Work for the scheduler, which interrupts whoever runs for long.
	stop := make(chan bool)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	group.Wait()
	close(stop)
	// The runtime may have opened two of its own; a call that was made twice shows in the service's count.
	left := opened() - before
	fmt.Printf("failed %d, left open %d\n", failures.Load(), left)
	if failures.Load() != 0 || left > 2 {
		os.Exit(1)
	}
}
