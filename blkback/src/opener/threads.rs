//! One thread for each image that is being opened, however often that is asked for: what hangs has one thread hanging.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a thread is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// The image of this name: opened, looked at.
    Image(PathBuf),
    /// A device, by its directory in XenStore: what it had is closed. Not behind others who open the same image.
    Closing(String),
}

type Work = Box<dyn FnOnce() + Send>;

/// Threads that open and close images, each while there is something to do.
#[derive(Debug, Clone, Default)]
pub struct Openers(Arc<Mutex<Lines>>);

/// What waits for each thread that there is.
#[derive(Default)]
struct Lines(HashMap<Place, VecDeque<Work>>);

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Openers {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.lines().0.len()
    }

    /// Has `work` done on the thread of `place`, after what was given to it before, and calls `done` there when its result
    /// can be [taken](Job::take).
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn begin<T: Send + 'static>(
        &self,
        place: Place,
        work: impl FnOnce() -> T + Send + 'static,
        done: impl FnOnce() + Send + 'static,
    ) -> io::Result<Job<T>> {
        let outcome = Arc::new(Mutex::new(Outcome::Awaited));
        let told = Arc::clone(&outcome);
        self.put(
            &place,
            Box::new(move || {
                if matches!(*lock(&told), Outcome::Unwanted) {
                    return;
                }
                // Nothing that it has touched is seen again.
                let result = catch_unwind(AssertUnwindSafe(work)).map_err(|_| Panicked);
                let mut outcome = lock(&told);
                if matches!(*outcome, Outcome::Unwanted) {
                    // Closed here, where it may hang.
                    drop(outcome);
                    return drop(result);
                }
                *outcome = Outcome::There(result);
                drop(outcome);
                done();
            }),
        )?;
        Ok(Job { outcome, openers: self.clone(), place })
    }

    /// Has `work` done on the thread of `place`, after what was given to it before.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn run(&self, place: &Place, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.put(place, Box::new(work))
    }

    fn put(&self, place: &Place, work: Work) -> io::Result<()> {
        let mut lines = self.lines();
        if let Some(line) = lines.0.get_mut(place) {
            line.push_back(work);
            return Ok(());
        }
        let (openers, its) = (self.clone(), place.clone());
        std::thread::Builder::new().name("opener".to_owned()).spawn(move || openers.work(&its))?;
        lines.0.insert(place.clone(), VecDeque::from([work]));
        Ok(())
    }

    fn work(&self, place: &Place) {
        loop {
            let mut lines = self.lines();
            let Some(work) = lines.0.get_mut(place).and_then(VecDeque::pop_front) else {
                lines.0.remove(place);
                return;
            };
            drop(lines);
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!(?place, "closing an image panicked");
            }
        }
    }
}

/// It panicked instead of coming to an end: a bug of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("opening it failed by a bug of blkback's own; its log has more")]
pub struct Panicked;

enum Outcome<T> {
    /// Not there yet.
    Awaited,
    /// To be taken.
    There(Result<T, Panicked>),
    /// Was taken, or is to be thrown away.
    Unwanted,
}

fn lock<T>(outcome: &Mutex<Outcome<T>>) -> MutexGuard<'_, Outcome<T>> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that an opener was asked for. Dropped, it is not wanted any more: what has begun goes on to its end, and the
/// result is thrown away on the opener's thread.
pub struct Job<T: Send + 'static> {
    outcome: Arc<Mutex<Outcome<T>>>,
    openers: Openers,
    place: Place,
}

impl<T: Send + 'static> Job<T> {
    /// The result, if it is there; once.
    ///
    /// # Errors
    /// If there is none, and never will be.
    pub fn take(&mut self) -> Option<Result<T, Panicked>> {
        let mut outcome = lock(&self.outcome);
        match std::mem::replace(&mut *outcome, Outcome::Unwanted) {
            Outcome::There(result) => Some(result),
            other => {
                *outcome = other;
                None
            }
        }
    }
}

impl<T: Send + 'static> Drop for Job<T> {
    fn drop(&mut self) {
        let left = std::mem::replace(&mut *lock(&self.outcome), Outcome::Unwanted);
        if let Outcome::There(result) = left
            && let Err(error) = self.openers.run(&self.place, move || drop(result))
        {
            tracing::warn!(%error, "no thread to close an image on; closed here");
        }
    }
}

impl<T: Send + 'static> std::fmt::Debug for Job<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("place", &self.place).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::{Duration, Instant};

    use super::*;

    const PLACE: &str = "/dev/vg/x";

    fn image() -> Place {
        Place::Image(PLACE.into())
    }

    /// Work that hangs until something is sent.
    fn hanging(openers: &Openers) -> (Sender<()>, Job<&'static str>, Receiver<()>) {
        let (go, hangs) = channel();
        let (done, ended) = channel();
        let work = move || {
            hangs.recv().unwrap();
            "first"
        };
        (go, openers.begin(image(), work, move || done.send(()).unwrap()).unwrap(), ended)
    }

    fn until(what: &str, so: impl Fn() -> bool) {
        let began = Instant::now();
        while !so() {
            assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_hangs_has_one_thread_and_keeps_nobody_else() {
        let openers = Openers::default();
        let (go, mut first, ended) = hanging(&openers);
        // Tried again and again, and given up each time.
        for _ in 0..100 {
            drop(openers.begin(image(), || unreachable!("nobody wants it"), || unreachable!()).unwrap());
        }
        let (done, second_ended) = channel();
        let mut second = openers.begin(image(), || "second", move || done.send(()).unwrap()).unwrap();
        assert_eq!((openers.threads(), first.take(), second.take()), (1, None, None));
        let (done, other_ended) = channel();
        let other = Place::Image("/dev/vg/y".into());
        let mut other = openers.begin(other, || "other", move || done.send(()).unwrap()).unwrap();
        other_ended.recv().unwrap();
        assert_eq!((other.take(), other.take(), first.take()), (Some(Ok("other")), None, None));
        go.send(()).unwrap();
        ended.recv().unwrap();
        second_ended.recv().unwrap();
        assert_eq!((first.take(), second.take()), (Some(Ok("first")), Some(Ok("second"))));
        until("the threads end", || openers.threads() == 0);
    }

    #[test]
    fn a_panic_is_an_answer() {
        let openers = Openers::default();
        let (done, ended) = channel();
        let mut job = openers
            .begin(image(), || -> u32 { panic!("as a bug of ours would") }, move || done.send(()).unwrap())
            .unwrap();
        ended.recv().unwrap();
        assert_eq!(job.take(), Some(Err(Panicked)));
        until("the threads end", || openers.threads() == 0);
    }

    /// Says on which thread it was dropped.
    struct Closes(Sender<Option<String>>);

    impl Drop for Closes {
        fn drop(&mut self) {
            self.0.send(std::thread::current().name().map(str::to_owned)).unwrap();
        }
    }

    #[test]
    fn what_is_not_wanted_is_closed_on_the_openers_thread() {
        let openers = Openers::default();
        // Given up before it is there, and after.
        for early in [true, false] {
            let (closed, where_closed) = channel();
            let (go, hangs) = channel::<()>();
            let (done, ended) = channel();
            let (begins, has_begun) = channel();
            let work = move || {
                begins.send(()).unwrap();
                hangs.recv().unwrap();
                Closes(closed)
            };
            let job = openers.begin(image(), work, move || done.send(()).unwrap()).unwrap();
            // What has not begun is not even tried.
            has_begun.recv().unwrap();
            if early {
                drop(job);
                go.send(()).unwrap();
            } else {
                go.send(()).unwrap();
                ended.recv().unwrap();
                drop(job);
            }
            assert_eq!(where_closed.recv().unwrap().as_deref(), Some("opener"));
            until("the threads end", || openers.threads() == 0);
        }
    }
}
