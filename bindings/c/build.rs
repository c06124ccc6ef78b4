//! Gives the shared library the name that programs ask for at run time: it holds the version of the
//! binary interface.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // As `ABI_VERSION` in src/lib.rs; tests/c.rs compares them.
    match std::env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("linux" | "freebsd") => println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libredraft.so.0"),
        Ok("macos") => println!("cargo:rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libredraft.0.dylib"),
        _ => {}
    }
}
