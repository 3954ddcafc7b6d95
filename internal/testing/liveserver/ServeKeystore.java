import java.io.IOException;
import java.io.InputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.security.KeyStore;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import sun.misc.Signal;

/**
 * A TLS server on loopback that uses a key store and reloads it on SIGHUP. It writes the outcome of
 * each load to a file: the number of the load, and ok or the error.
 *
 * The password file contains the store's password and, on a second line, the key's if it differs.
 */
public class ServeKeystore {
    static volatile SSLContext context;
    static int loads;

    public static void main(String[] args) throws Exception {
        Path store = Path.of(args[0]), passwords = Path.of(args[1]), outcome = Path.of(args[2]);
        context = load(store, passwords);
        note(outcome, "ok");
        Signal.handle(new Signal("HUP"), signal -> reload(store, passwords, outcome));
        ServerSocket listener = new ServerSocket(Integer.parseInt(args[3]), 1024, InetAddress.getLoopbackAddress());
        ExecutorService clients = Executors.newCachedThreadPool();
        while (true) {
            Socket client = listener.accept();
            clients.execute(() -> serve(client));
        }
    }

    static synchronized void reload(Path store, Path passwords, Path outcome) {
        try {
            try {
                context = load(store, passwords);
                note(outcome, "ok");
            } catch (Exception e) {
                note(outcome, e.toString());
            }
        } catch (IOException e) {
            e.printStackTrace();
        }
    }

    static SSLContext load(Path store, Path passwords) throws Exception {
        List<String> lines = Files.readAllLines(passwords);
        char[] password = lines.get(0).toCharArray(), keyPassword = lines.get(lines.size() - 1).toCharArray();
        KeyStore keys = KeyStore.getInstance("PKCS12"); // loads JKS too
        try (InputStream in = Files.newInputStream(store)) {
            keys.load(in, password);
        }
        KeyManagerFactory managers = KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
        managers.init(keys, keyPassword);
        SSLContext loaded = SSLContext.getInstance("TLS");
        loaded.init(managers.getKeyManagers(), null, null);
        return loaded;
    }

    static void note(Path outcome, String text) throws IOException {
        Path next = outcome.resolveSibling(outcome.getFileName() + ".next");
        Files.writeString(next, ++loads + " " + text + "\n");
        Files.move(next, outcome, StandardCopyOption.ATOMIC_MOVE);
    }

    static void serve(Socket client) {
        try (client) {
            client.setSoTimeout(10_000);
            try (SSLSocket tls = (SSLSocket) context.getSocketFactory().createSocket(client, null, true)) {
                tls.startHandshake();
                tls.getInputStream().read(); // until the client has seen enough
            }
        } catch (IOException e) {
            // A client that went away.
        }
    }
}
