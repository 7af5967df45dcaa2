use std::os::fd::AsFd;
use std::rc::Rc;

use hypervisor::memory::Mapping;

use super::*;

fn list(mapping: &Rc<Mapping>, offset: usize, len: usize) -> IoList {
    let mut list = IoList::default();
    list.push(mapping, offset, len);
    list
}

fn one<T>(ring: &mut Uring<T>) -> Completion<T> {
    loop {
        if let Some(completion) = ring.reap() {
            return completion;
        }
        ring.wait(None).unwrap();
    }
}

#[test]
fn what_is_written_is_read_back() {
    let file = tempfile::tempfile().unwrap();
    let mut ring = Uring::new(4, &[file.as_fd()]).unwrap();
    let memory = Rc::new(Mapping::anonymous(8192).unwrap());
    memory.copy_in(0, b"dom0");
    ring.push(FileSlot(0), Operation::Write(512), list(&memory, 0, 4096), 'w');
    let written = one(&mut ring);
    assert_eq!((written.token, written.result.unwrap()), ('w', 4096));

    ring.push(FileSlot(0), Operation::Datasync, IoList::default(), 's');
    assert_eq!(one(&mut ring).result.unwrap(), 0);

    let mut scattered = IoList::default();
    scattered.push(&memory, 4096, 2);
    scattered.push(&memory, 6000, 2);
    ring.push(FileSlot(0), Operation::Read(512), scattered, 'r');
    assert_eq!(one(&mut ring).result.unwrap(), 4);
    let mut halves = [0; 4];
    memory.copy_out(4096, &mut halves[..2]);
    memory.copy_out(6000, &mut halves[2..]);
    assert_eq!(&halves, b"dom0");

    ring.push(FileSlot(0), Operation::Punch { offset: 0, len: 8192 }, IoList::default(), 'p');
    let punched = one(&mut ring);
    if let Err(error) = &punched.result {
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "the file system of the temporary folder");
    } else {
        ring.push(FileSlot(0), Operation::Read(512), list(&memory, 0, 4), 'r');
        assert_eq!(one(&mut ring).result.unwrap(), 4);
        let mut zeros = [1; 4];
        memory.copy_out(0, &mut zeros);
        assert_eq!(zeros, [0; 4]);
    }
}

#[test]
fn an_operation_keeps_its_memory_and_drop_waits() {
    let (mut reader, _writer) = io::pipe().unwrap();
    let memory = Rc::new(Mapping::anonymous(4096).unwrap());
    let mut ring = Uring::new(4, &[reader.as_fd()]).unwrap();
    ring.push(FileSlot(0), Operation::Poll, IoList::default(), 0);
    ring.submit().unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut other = Uring::new(4, &[file.as_fd()]).unwrap();
    other.push(FileSlot(0), Operation::Write(0), list(&memory, 0, 4096), 1);
    assert_eq!(Rc::strong_count(&memory), 2);
    drop(other);
    assert_eq!(Rc::strong_count(&memory), 1);
    // The poll never fires; drop cancels it instead of waiting for good.
    drop(ring);
    drop(_writer);
    io::Read::read_to_end(&mut reader, &mut Vec::new()).unwrap();
}

#[test]
fn only_the_allowed_opcodes_pass() {
    let file = tempfile::tempfile().unwrap();
    let mut ring: Uring<u8> = Uring::new(4, &[file.as_fd()]).unwrap();
    let nop = opcode::Nop::new().build().user_data(CANCEL - 1);
    // SAFETY: a no-op names no memory.
    unsafe { ring.ring.submission().push(&nop).unwrap() };
    ring.ring.submit_and_wait(1).unwrap();
    let refused = ring.ring.completion().next().unwrap();
    assert_eq!(refused.result(), -libc::EACCES);
    let unregistered = opcode::Fsync::new(io_uring::types::Fd(file.as_raw_fd())).build().user_data(CANCEL - 1);
    // SAFETY: fsync names no memory.
    unsafe { ring.ring.submission().push(&unregistered).unwrap() };
    ring.ring.submit_and_wait(1).unwrap();
    let refused = ring.ring.completion().next().unwrap();
    assert_eq!(refused.result(), -libc::EACCES, "a file that is not registered");
}

#[test]
fn more_operations_than_the_queue_has_room_for_wait_their_turn() {
    let file = tempfile::tempfile().unwrap();
    let mut ring = Uring::new(100, &[file.as_fd()]).unwrap();
    let memory = Rc::new(Mapping::anonymous(4096).unwrap());
    for round in 0..100u32 {
        ring.push(FileSlot(0), Operation::Write(u64::from(round) * 512), list(&memory, 0, 512), round);
    }
    let mut seen = [false; 100];
    for _ in 0..100 {
        seen[one(&mut ring).token as usize] = true;
    }
    assert_eq!(seen, [true; 100]);
}

#[test]
#[should_panic(expected = "read-only memory")]
fn a_read_into_read_only_memory_panics() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let memory = Rc::new(Mapping::of_file(&file, 0, 4096, false).unwrap());
    let mut ring = Uring::new(4, &[file.as_fd()]).unwrap();
    ring.push(FileSlot(0), Operation::Read(0), list(&memory, 0, 512), ());
}
