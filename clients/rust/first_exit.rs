//! From a restricted descriptor to a guest's first exit, in Rust.
//!
//! The program speaks the protocol of docs/reference/wire-protocol.md with std and libc's sockets
//! alone.
//!
//!     rustc --edition 2021 first_exit.rs && ./first_exit SOCKET
//!
//! SOCKET is that of `restrictedmem serve`. The program prints the exit: port, size and data of the
//! guest's `out 0x42, al`.

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null;

const PAGE: u64 = 4096;
const GPA: u64 = 0x4000_0000;

#[repr(C)]
struct IoVec(*const c_void, usize);

/// `struct msghdr` of 64-bit Linux.
#[repr(C)]
struct MsgHdr(*const c_void, u32, *const IoVec, usize, *mut c_void, usize, c_int);

/// `struct cmsghdr` with two descriptors: SCM_RIGHTS.
#[repr(C, align(8))]
struct Rights(usize, c_int, c_int, [c_int; 2]);

extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn getsockopt(
        socket: c_int,
        level: c_int,
        name: c_int,
        value: *mut c_void,
        size: *mut u32,
    ) -> c_int;
    fn connect(socket: c_int, name: *const c_void, size: u32) -> c_int;
    fn send(socket: c_int, message: *const c_void, size: usize, flags: c_int) -> isize;
    fn recvmsg(socket: c_int, message: *mut MsgHdr, flags: c_int) -> isize;
    fn openat(directory: c_int, name: *const c_char, flags: c_int, mode: u32) -> c_int;
    fn unlinkat(directory: c_int, name: *const c_char, flags: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, argument: *const c_void) -> c_int;
}

const AF_UNIX: c_int = 1;
const SEQPACKET: c_int = 5 | 0o2000000; // and close-on-exec
const RIGHTS_SIZE: usize = std::mem::size_of::<Rights>();

fn checked(value: c_int) -> Result<RawFd> {
    if value < 0 { Err(Error::last_os_error()) } else { Ok(value) }
}

fn owned(fd: RawFd) -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Return pid, uid and gid of the process that made the other end (SO_PEERCRED).
fn peer(of: &OwnedFd) -> Result<[u32; 3]> {
    let (mut found, mut size) = ([0; 3], 12);
    checked(unsafe { getsockopt(of.as_raw_fd(), 1, 17, found.as_mut_ptr().cast(), &mut size) })?;
    Ok(found)
}

/// Receive a message: its first word, its body, and its descriptors.
fn receive(from: &OwnedFd) -> Result<(u32, Vec<u8>, Vec<OwnedFd>)> {
    let mut message = vec![0u8; 128 << 10];
    let piece = IoVec(message.as_mut_ptr().cast(), message.len());
    let mut rights = Rights(0, 0, 0, [-1; 2]);
    let mut header = MsgHdr(null(), 0, &piece, 1, (&raw mut rights).cast(), RIGHTS_SIZE, 0);
    let got = unsafe { recvmsg(from.as_raw_fd(), &mut header, 0x4000_0000) }; // MSG_CMSG_CLOEXEC
    let size = checked(got as c_int)? as usize;
    if size < 8 {
        return Err(Error::other("the other end is gone"));
    }
    message.truncate(size);
    let body = message.split_off(8);
    let fds = if header.5 >= 20 {
        rights.3[..(rights.0 - 16) / 4].iter().map(|fd| owned(*fd)).collect()
    } else {
        vec![]
    };
    Ok((u32::from_ne_bytes(message[..4].try_into().unwrap()), body, fds))
}

fn call(to: &OwnedFd, number: u32, body: &[u8]) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let message = [&number.to_ne_bytes(), &[0; 4], body].concat();
    let sent = unsafe { send(to.as_raw_fd(), message.as_ptr().cast(), message.len(), 0x4000) };
    checked(sent as c_int)?; // 0x4000: MSG_NOSIGNAL
    let (error, reply, got) = receive(to)?;
    if error != 0 {
        let name = Error::from_raw_os_error(error as i32);
        return Err(Error::other(format!("{name}: {}", String::from_utf8_lossy(&reply))));
    }
    Ok((reply, got))
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Connect to a socket by its path, or by its abstract name after an @.
fn dial(path: &str) -> Result<OwnedFd> {
    let mut name = [0u8; 110];
    name[0] = AF_UNIX as u8;
    name[2..2 + path.len()].copy_from_slice(path.as_bytes());
    let mut size = 110;
    if path.starts_with('@') {
        name[2] = 0;
        size = 2 + path.len() as u32;
    }
    let to = owned(checked(unsafe { socket(AF_UNIX, SEQPACKET, 0) })?);
    checked(unsafe { connect(to.as_raw_fd(), name.as_ptr().cast(), size) })?;
    Ok(to)
}

/// Return a string of READY's JSON object.
fn string(json: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(json);
    let after = text.split_once(&format!("\"{name}\": \"")).map_or("", |(_, after)| after);
    after.split('"').next().unwrap_or("").to_string()
}

fn main() -> Result<()> {
    let path = std::env::args().nth(1).ok_or(Error::other("usage: first_exit SOCKET"))?;
    let first = dial(&path)?;
    let (READY, ready, fds) = receive(&first)? else {
        return Err(Error::other("the service cannot start"));
    };
    let [root, witness] = &fds[..] else {
        return Err(Error::other("READY without its descriptors"));
    };

    let (socket, key) = (string(&ready, "socket"), string(&ready, "key"));
    let service = dial(&socket)?;
    if peer(&service)? != peer(witness)? {
        return Err(Error::other("the service is gone, and another process listens at its socket"));
    }
    let key: Vec<u8> =
        (0..16).map(|at| u8::from_str_radix(&key[2 * at..2 * at + 2], 16).unwrap()).collect();
    call(&service, CONNECT, &key)?;
    let file = unsafe {
        // O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC
        let (name, flags) = (c"restrictedmem".as_ptr(), 0o2 | 0o100 | 0o200 | 0o2000000);
        let fd = owned(checked(openat(root.as_raw_fd(), name, flags, 0o600))?);
        unlinkat(root.as_raw_fd(), name, 0);
        File::from(fd)
    };
    file.set_len(PAGE)?;
    let (token, _) = call(&service, TOKEN, &[])?;
    checked(unsafe { ioctl(file.as_raw_fd(), PROVE, token.as_ptr().cast()) })?;

    let (_, fds) = call(&service, SPAWN, br#"kvm {"engine": "software"}"#)?;
    let [vm] = &fds[..] else { return Err(Error::other("no VM")) };
    let mut region = words(&[4 << 32, GPA, PAGE, 0, 0]); // slot 0, KVM_MEM_PRIVATE
    region.resize(160, 0);
    region.extend_from_slice(&token);
    call(vm, SET_USER_MEMORY_REGION, &region)?;
    call(vm, SET_MEMORY_ATTRIBUTES, &words(&[GPA, PAGE, 1 << 3, 0]))?;
    let (_, fds) = call(vm, CREATE_VCPU, &[])?;
    let [vcpu] = &fds[..] else { return Err(Error::other("no vCPU")) };

    let mut content = words(&[GPA]);
    content.extend_from_slice(&[0xb0, 0x2a, 0xe6, 0x42]); // mov al, 42; out 0x42, al
    content.resize(8 + PAGE as usize, 0);
    call(vm, LAUNCH_UPDATE, &content)?;
    let mut regs = [0; 18];
    regs[16] = GPA; // rip
    call(vcpu, SET_REGS, &words(&regs))?;
    let (exit, _) = call(vcpu, RUN, &words(&[0]))?;
    let exit: Vec<u64> =
        exit.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!((exit.len(), exit[0]), (7, 1 << 32 | 2), "an out (KVM_EXIT_IO)");
    println!("{:#x} {} {}", exit[1], exit[2], exit[3]);
    Ok(())
}

const CONNECT: u32 = 1;
const TOKEN: u32 = 2;
const SPAWN: u32 = 3;
const READY: u32 = 65536;
const PROVE: c_ulong = 0x4010_5201;
const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const SET_MEMORY_ATTRIBUTES: u32 = 0x4020_aed2;
const CREATE_VCPU: u32 = 0xae41;
const LAUNCH_UPDATE: u32 = 65537;
const SET_REGS: u32 = 0x4090_ae82;
const RUN: u32 = 0xae80;
