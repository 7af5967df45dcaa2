//! What the programs of backends have in common: arguments, log, signals, and serving until told to stop.

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use xenstore_client::xenbus::{Device, Driver, Kind, StopHandle};
use xenstore_client::{DomId, abandon_silent};

use crate::{Backend, Claim, Machine};

/// How long a server that was told to stop may take before the next one gives up on it.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// How long a request to XenStore may wait for its answer once this process was told to stop.
const SILENCE: Duration = Duration::from_secs(10);

/// A sentence for whoever typed the command.
pub type Failure = Box<dyn std::error::Error>;

/// Which machine, and who we are on it.
#[derive(Debug, clap::Args)]
pub struct MachineArguments {
    /// The machine to work on: xen, or emu:DIR where `emu-xen serve --dir DIR` runs (default: xen, in a domain of it)
    #[arg(long, global = true, value_name = "MACHINE")]
    pub hypervisor: Option<Machine>,
    /// The domain the backend runs in on an emulated machine: 0, or a driver domain
    #[arg(long, global = true, default_value_t = DomId(0), value_name = "DOMID")]
    pub backend_domid: DomId,
}

impl MachineArguments {
    /// The machine that was named, or real Xen if this kernel runs on it.
    ///
    /// # Errors
    /// When neither is the case.
    pub fn machine(&self) -> Result<Machine, Failure> {
        let found = self.hypervisor.clone().or_else(Machine::find);
        Ok(found.ok_or(
            "this is no domain of Xen (no /dev/xen here): name an emulated machine with --hypervisor emu:DIR, \
             where emu-xen serve --dir DIR runs",
        )?)
    }

    /// The right to be `program` for the backend's domain, which only one process has at a time. Keep it while serving.
    ///
    /// # Errors
    /// When there is no machine, or another process has it.
    pub fn claim(&self, program: &str) -> Result<Claim, Failure> {
        Ok(self.machine()?.claim(program, self.backend_domid, PREDECESSOR)?)
    }

    /// Joins the machine as the backend's domain.
    ///
    /// # Errors
    /// When there is no machine, or it refuses.
    pub fn join(&self) -> Result<Arc<dyn Backend>, Failure> {
        Ok(self.machine()?.join_backend(self.backend_domid)?)
    }
}

/// Reads the arguments, of which the first is the program's name, and runs the program; what fails is said on standard
/// error, after `name`.
pub fn run<C: clap::Parser>(
    name: &str,
    args: impl IntoIterator<Item = OsString>,
    execute: impl FnOnce(C) -> Result<(), Failure>,
) -> ExitCode {
    let cli = match C::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output, mistakes to standard error; a closed pipe is nobody's loss.
            let _ = error.print();
            return ExitCode::from(error.exit_code().clamp(0, 255) as u8);
        }
    };
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Sends the log to standard error, from `level` on (`info` for a service, `warn` for a command) unless `RUST_LOG` says
/// otherwise.
pub fn log_to_stderr(level: &str) {
    use std::io::IsTerminal;

    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Whoever carries this program along may have a log already, which is then used.
    let _ = log.with_ansi(std::io::stderr().is_terminal()).try_init();
}

/// SIGTERM and SIGINT, which end a service in order.
#[derive(Debug)]
pub struct StopSignals(StopHandle);

impl StopSignals {
    /// Blocks them, and has a thread of its own wait for them. To be called before any other thread starts, so that all
    /// inherit the block and only one waits.
    ///
    /// From the first of these signals on, a XenStore that does not answer for 10 s is given up: whoever waits for it
    /// gets an error. So a server ends whatever it waits for, while it starts, serves or stops.
    ///
    /// # Errors
    /// When the kernel refuses, or there can be no further thread or eventfd.
    pub fn block() -> Result<Self, Failure> {
        let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
        signals.thread_block()?;
        let stop = StopHandle::new()?;
        let told = stop.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || match signals.wait() {
            Ok(signal) => {
                tracing::info!(%signal, "stopping");
                told.stop();
                leave_silent_stores();
            }
            Err(error) => tracing::error!(%error, "cannot wait for signals"),
        })?;
        Ok(Self(stop))
    }

    /// A handle that is stopped when one of them comes.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        self.0.clone()
    }
}

/// Until the process ends.
fn leave_silent_stores() -> ! {
    loop {
        abandon_silent(SILENCE);
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Stops everybody when it is dropped: also when its thread panics, or nobody would know that it is gone.
struct StopAll<'a>(&'a StopHandle);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Serves with all of these until `stop`, each on a control thread of its own; when one ends, all do, however it ends.
///
/// # Errors
/// The first driver's that failed or panicked: the process is of no use any more, and is to end with an exit code that says
/// so.
pub fn serve<K>(drivers: Vec<Driver<K>>, stop: &StopHandle) -> Result<(), Failure>
where
    K: Kind + Send,
    K::Device: Device + Send,
{
    std::thread::scope(|scope| {
        let run = |mut driver: Driver<K>| {
            scope.spawn(move || {
                let _all = StopAll(stop);
                driver.run(stop)
            })
        };
        let threads: Vec<_> = drivers.into_iter().map(run).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(outcome) => outcome.map_err(Failure::from),
            Err(_) => Err("a control thread panicked; see the log".into()),
        })
    })
}

#[cfg(test)]
mod tests {
    use xenstore_client::Store;
    use xenstore_client::server::Server;
    use xenstore_client::xenbus::{DeviceId, Fault, Keys, Notifier, Progress};

    use super::*;

    /// A kind of devices that panics when there is one.
    struct Panics(&'static str);

    struct Never;

    impl Kind for Panics {
        type Device = Never;

        fn name(&self) -> &str {
            self.0
        }

        fn frontend_keys(&self) -> &[&str] {
            &[]
        }

        fn create(&mut self, _: &DeviceId, _: &Keys, _: Notifier) -> Result<Never, Fault> {
            panic!("as a bug of ours would")
        }
    }

    impl Device for Never {
        fn features(&mut self) -> Result<Vec<(String, String)>, Fault> {
            Ok(Vec::new())
        }
        fn open(&mut self, _: &Keys) -> Result<Progress<Vec<(String, String)>>, Fault> {
            Ok(Progress::Done(Vec::new()))
        }
        fn connect(&mut self, _: &Keys) -> Result<Vec<(String, String)>, Fault> {
            Ok(Vec::new())
        }
        fn disconnect(&mut self) {}
        fn release(&mut self) -> Progress<()> {
            Progress::Done(())
        }
    }

    /// A server whose control thread is gone must not stay, well to look at and dead to its guests.
    #[test]
    fn a_panic_of_one_control_thread_ends_them_all() {
        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        let drivers: Vec<_> = ["well", "bad"]
            .map(|name| Driver::new(server.connect(DomId::DOM0).unwrap(), DomId::DOM0, Panics(name)).unwrap())
            .into();
        std::thread::spawn(move || {
            let stop = StopHandle::new().unwrap();
            let outcome = serve(drivers, &stop).map_err(|error| error.to_string());
            done.send((outcome, stop.is_stopped())).unwrap();
        });
        let back = "/local/domain/0/backend/bad/1/0";
        let keys =
            [("frontend", "/local/domain/1/device/bad/0"), ("frontend-id", "1"), ("online", "1"), ("state", "1")];
        for (key, value) in keys {
            store.write(&format!("{back}/{key}"), value).unwrap();
        }
        let (outcome, stopped) = ended.recv_timeout(Duration::from_secs(60)).expect("serve goes on for ever");
        assert!(outcome.unwrap_err().contains("panicked") && stopped);
    }
}
