package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What is mounted upon what, and how it comes down.

// patience is how long a step may take that touches a mounted file system.
const patience = 20 * time.Second

// A site is where everything lies.
type site struct {
	work string // a folder of our own
	fuse string // where the losing file system is mounted
	ext4 string // where the file system on the image is mounted; empty: there is none
}

func (s site) socket() string { return filepath.Join(s.work, "socket") }

// image is the disk image. Its name is like no other's, so that a loop device that holds it can be told.
func (s site) image() string {
	return filepath.Join(s.fuse, diskName, filepath.Base(s.work)+".img")
}

// dir is the folder whose power is cut.
func (s site) dir() string { return cmp.Or(s.ext4, filepath.Join(s.fuse, diskName)) }

// cut cuts the power and switches it on again: afterwards the folder shows what the disk has kept.
func cut(args []string) error {
	if len(args) != 1 && len(args) != 3 {
		return errors.New("cut wants a socket, or a socket, an image and a folder")
	}
	answer, err := ask(args[0], askCut)
	if err != nil || answer == spared || len(args) == 1 {
		return err
	}
	// What the kernel still writes to the old image reaches the old world only.
	if err := unix.Unmount(args[2], unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", args[2], err)
	}
	return mountImage(args[1], args[2])
}

// mountImage mounts the file system in an image. Its loop device goes away with the mount.
func mountImage(image, dir string) error {
	device, err := attach(image)
	if err != nil {
		return fmt.Errorf("a loop device for %s: %w", image, err)
	}
	defer device.Close()
	if err := unix.Mount(device.Name(), dir, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", device.Name(), dir, err)
	}
	return nil
}

// attach puts an image behind a free loop device, which lets go of it when nobody has the device open any more.
func attach(image string) (*os.File, error) {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		c := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		copy(c.Info.File_name[:len(c.Info.File_name)-1], image)
		err = unix.IoctlLoopConfigure(int(device.Fd()), &c)
		if err == nil {
			return device, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) { // busy: somebody else was faster
			return nil, err
		}
	}
}

// takeDown unmounts everything. The losing file system goes last, when no loop device needs it any more.
func (s site) takeDown() error {
	var failed []error
	if s.ext4 != "" && s.mounted(s.ext4) {
		failed = append(failed, unix.Unmount(s.ext4, unix.MNT_DETACH))
	}
	for deadline := time.Now().Add(patience / 2); len(s.loops()) > 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if s.mounted(s.fuse) {
		failed = append(failed, unix.Unmount(s.fuse, unix.MNT_DETACH))
	}
	return errors.Join(failed...)
}

// leftovers are the mounts and loop devices that are there.
func (s site) leftovers() (list []string) {
	for _, dir := range []string{s.fuse, s.ext4} {
		if dir != "" && s.mounted(dir) {
			list = append(list, dir)
		}
	}
	return append(list, s.loops()...)
}

func (s site) mounted(dir string) bool {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return false
	}
	escaped := strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(dir)
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == escaped {
			return true
		}
	}
	return false
}

// loops are the loop devices that hold the image, of whichever world.
func (s site) loops() (list []string) {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		if image, err := os.ReadFile(file); err == nil && strings.Contains(string(image), filepath.Base(s.image())) {
			list = append(list, "/dev/"+strings.Split(file, "/")[3])
		}
	}
	return list
}
