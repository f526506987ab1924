// Asks a server as Java's own client does, which asks for HTTP/2 with every request: java Client.java ADDRESS
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.List;

class Client {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        var body = "{\"inputs\": [\"red\"]}";
        var chunked = BodyPublishers.fromPublisher(BodyPublishers.ofString(body)); // of a length that it does not say
        var large = "{\"inputs\": [\"" + "red ".repeat(7_000) + "\"]}";
        for (var publisher : List.of(BodyPublishers.ofString(body), chunked, BodyPublishers.ofString(large))) {
            print(client, HttpRequest.newBuilder(URI.create(arguments[0] + "/embed"))
                .header("Content-Type", "application/json").POST(publisher).build());
        }
        print(client, HttpRequest.newBuilder(URI.create(arguments[0] + "/healthz")).build());
        print(client, HttpRequest.newBuilder(URI.create(arguments[0] + "/items/a")).DELETE().build());
    }

    static void print(HttpClient client, HttpRequest request) throws Exception {
        var response = client.send(request, BodyHandlers.ofString());
        System.out.println(response.statusCode() + " " + response.version() + " " + response.body());
    }
}
